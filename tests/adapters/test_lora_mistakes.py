"""Bad input to every LoRA tool: named by file and key, exit code 2, nothing written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.adapters.formats.writer import save_adapter
from trainer.contract.variants import VARIANTS
from trainer.models.wan.loading import save_transformer

from .lora_tool_runs import lora, refusal
from .tiny_models import make_factors, make_transformer

KEY = "lora_unet_blocks_0_self_attn_q"


@pytest.fixture
def files(tmp_path):
    """A folder with a good LoRA, a base, and one of every sort of bad file."""
    good = tmp_path / "good.safetensors"
    lora(good, metadata={"menma.expert": "high_noise"})
    lora(tmp_path / "late.safetensors", seed=3)
    save_transformer(make_transformer(), tmp_path / "base.safetensors")
    tensors = load_file(good)

    def write(name, **changes):
        table = tensors | {key.replace("__", "."): value for key, value in changes.items()}
        kept = {key: value for key, value in table.items() if value is not None}
        save_file(kept, tmp_path / f"{name}.safetensors")

    down = tensors[f"{KEY}.lora_down.weight"]
    write("nan", **{f"{KEY}__lora_down__weight": down * float("nan")})
    write("no_up", **{f"{KEY}__lora_up__weight": None})
    write("alpha", **{f"{KEY}__alpha": torch.tensor(float("inf"))})
    write("alphas", **{f"{KEY}__alpha": torch.ones(2)})
    write("no_alpha", **{f"{KEY}__alpha": None})
    write("oft", **{f"{KEY}__oft_blocks": torch.zeros(1)})
    write("alien", lora_unet_middle_block__lora_up__weight=torch.zeros(2, 2))
    empty = {"lora_down": torch.zeros(0, 24), "lora_up": torch.zeros(24, 0)}
    write("rank0", **{f"{KEY}__{part}__weight": value for part, value in empty.items()})
    write("ranks", **{f"{KEY}__lora_down__weight": torch.zeros(3, 24)})
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "text.safetensors").write_bytes(b"hello")
    wide = make_factors(make_transformer(dim=48), names=["blocks.2.ffn.0"])
    save_adapter(wide, tmp_path / "wide.safetensors")
    lora(tmp_path / "low.safetensors", metadata={"menma.expert": "low_noise"}, seed=4)
    lora(tmp_path / "fish_low_noise.safetensors", seed=5)
    save_transformer(make_transformer(dim=48), tmp_path / "wide_base.safetensors")
    return tmp_path


def requests(folder, bad):
    """Yield every tool with one bad file among good ones."""
    path, good, base = (folder / f"{name}.safetensors" for name in (bad, "late", "base"))
    output = folder / "out.safetensors"
    yield "inspect", {"path": path}
    yield "convert", {"input": path, "output": output}
    yield "merge", {"base": base, "loras": [{"path": good}, {"path": path}], "output": output}
    yield "lora_merge", {"loras": [{"path": good}, {"path": path}], "output": output}
    yield "lora_subtract", {"minuend": good, "loras": [{"path": path}], "output": output}
    yield "lora_subtract", {"minuend": path, "loras": [{"path": good}], "output": output}
    yield "lora_resize", {"input": path, "rank": 2, "output": output}
    yield "lora_ema", {"files": [good, path], "output": output}
    yield "lora_ema", {"files": [path, good], "output": output, "exact": True}
    yield "lora_blend", {
        "files": [{"path": good}, {"path": path}], "output": folder / "out", "share": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("nan", [f"{KEY}.lora_down.weight", "NaN"]),
        ("no_up", [KEY, "lacks its up"]),
        ("alpha", [f"{KEY}.alpha", "finite"]),
        ("no_alpha", [KEY, "lacks its alpha"]),
        ("alphas", [f"{KEY}.alpha", "one finite number"]),
        ("oft", ["OFT", f"{KEY}.oft_blocks"]),
        ("alien", ["lora_unet_middle_block"]),
        ("rank0", ["blocks.0.self_attn.q", "its rank is 0"]),
        ("ranks", ["blocks.0.self_attn.q"]),
        ("cut", []),
        ("text", []),
        ("gone", ["does not exist"]),
    ],
)
def test_a_bad_file_is_named_by_every_tool(files, capfd, bad, words):
    for job, request in requests(files, bad):
        said = refusal(job, files, capfd, **request)
        missing = [word for word in [f"{bad}.safetensors", *words] if word not in said]
        assert not missing, f"{job}: {missing} not in {said}"


def several(folder, *names):
    uses = [{"path": folder / f"{name}.safetensors"} for name in names]
    paths = [use["path"] for use in uses]
    output = folder / "out.safetensors"
    yield "lora_merge", {"loras": uses, "output": output}
    yield "lora_subtract", {"minuend": paths[0], "loras": uses[1:], "output": output}
    yield "lora_ema", {"files": paths, "output": output}
    yield "lora_ema", {"files": paths, "output": output, "exact": True}
    yield "lora_blend", {"files": uses, "output": folder / "out", "share": 0.5}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("good", "wide"), ["blocks.2.ffn.0 is (48, 48)", "(48, 24)", "different models"]),
        (("good", "low"), ["high_noise", "low_noise"]),
        (("good", "fish_low_noise"), ["high_noise", "low_noise"]),
        (("good", "good"), ["good.safetensors"]),
    ],
)
def test_files_that_do_not_belong_together(files, capfd, names, words):
    for job, request in several(files, *names):
        said = refusal(job, files, capfd, **request)
        if names == ("good", "wide") and "of one LoRA" in said:
            continue  # averages see first that the modules differ
        missing = [word for word in [f"{names[1]}.safetensors", *words] if word not in said]
        assert not missing, f"{job}: {missing} not in {said}"


def test_a_lora_of_another_model_is_not_merged(files, capfd):
    request = {
        "base": files / "wide_base.safetensors",
        "loras": [{"path": files / "late.safetensors"}],
        "output": files / "out.safetensors",
    }
    said = refusal("merge", files, capfd, **request)
    assert "late.safetensors is for another model" in said
    minuend = {"minuend": request.pop("base"), **request}
    assert "another model" in refusal("lora_subtract", files, capfd, **minuend)


@pytest.mark.parametrize("other", ["low", "fish_low_noise"])
def test_loras_of_both_experts_are_not_merged_into_one_base(files, capfd, other):
    loras = [{"path": files / f"{name}.safetensors"} for name in ("good", other)]
    request = {"base": files / "base.safetensors", "output": files / "out.safetensors"}
    said = refusal("merge", files, capfd, loras=loras, **request)
    assert "good.safetensors is for the high_noise expert" in said
    assert f"{other}.safetensors for the low_noise one" in said


def test_a_lora_of_the_1_3b_is_not_joined_to_one_of_the_14b(tmp_path, capfd):
    for size in ("1.3b", "14b"):
        width = VARIANTS[f"wan2.1-t2v-{size}"].transformer.dim
        stem = f"diffusion_model.blocks.{29 if width == 1536 else 39}.self_attn.q"
        tensors = {f"{stem}.lora_A.weight": torch.ones(1, width),
                   f"{stem}.lora_B.weight": torch.ones(width, 1)}  # fmt: skip
        save_file(tensors, tmp_path / f"{size}.safetensors")
    loras = [{"path": tmp_path / f"{size}.safetensors"} for size in ("1.3b", "14b")]
    said = refusal("lora_merge", tmp_path, capfd, loras=loras, output=tmp_path / "o.safetensors")
    assert "1.3b.safetensors: width 1536" in said
    assert "14b.safetensors: width 5120" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -3}, "rank"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"ratio": 0.5}, "ratio"),
        ({"layout": "comfyui"}, "comfy"),
        ({"dtype": "fp8"}, "dtype"),
        ({"output": "out.ckpt"}, "must end in .safetensors"),
        ({"strength": float("inf")}, "loras[0].strength"),
        ({"strength": float("nan")}, "loras[0].strength"),
        ({"strength": 0.0}, "nothing is left"),
        ({"existing": True}, "there already"),
        ({"input": True}, "is an input, too"),
    ],
    ids=str,
)
def test_wrong_options(files, capfd, change, words):
    output = files / change.pop("output", "out.safetensors")
    if change.pop("existing", False):
        output.write_bytes(b"mine")
    if change.pop("input", False):
        output, change = files / "late.safetensors", {"force": True}
    loras = [{"path": files / "late.safetensors", "strength": change.pop("strength", 1.0)}]
    assert words in refusal("lora_merge", files, capfd, loras=loras, output=output, **change)


def test_a_full_disk_leaves_the_old_file(files, monkeypatch):
    from trainer.contract.errors import DiskError
    from trainer.io import atomic_save

    from .lora_tool_runs import tool

    folder = files / "out"
    folder.mkdir()
    for name in ("late", "fish_low_noise"):
        (folder / f"{name}.safetensors").write_bytes(b"mine")
    calls = []

    def write(tensors, temporary, metadata, path):
        calls.append(path)
        if len(calls) == 2:
            raise DiskError("no space left")
        original(tensors, temporary, metadata, path)

    original = atomic_save._write
    monkeypatch.setattr(atomic_save, "_write", write)
    uses = [{"path": files / f"{name}.safetensors"} for name in ("late", "fish_low_noise")]
    with pytest.raises(DiskError):
        tool("lora_blend", files=uses, output=folder, share=0.5, force=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "fish_low_noise.safetensors", "late.safetensors",
    ]  # fmt: skip
    assert all(path.read_bytes() == b"mine" for path in folder.iterdir())
