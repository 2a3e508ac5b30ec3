"""`menma loraid`, `menma lora verify` and `--loraid`, with the jobs in this process."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from app.cli.loraid_options import loraid_fields, spread
from app.cli.main import run
from app.runs import child
from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats.writer import save_adapter
from trainer.contract.errors import UserError
from trainer.contract.jobs import JOBS, REQUESTS
from trainer.contract.loraid import Partition
from trainer.contract.loraid_metadata import loraid_metadata
from trainer.contract.variants import TransformerConfig
from trainer.jobs.base import run_guarded
from trainer.jobs.merge import merge_loras
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer

PARTS = Partition(num_blocks=2, slots=4)
SIZES = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 32, "freq_dim": 16}


@pytest.fixture
def jobs_here(monkeypatch):
    """Run jobs in this process: the request still goes through JSON."""
    requests = []

    def run_job(job, request, on_event, *_):
        requests.append(json.loads(json.dumps(request)))
        model = REQUESTS[job].model_validate(requests[-1])

        def emit(kind, /, **fields):
            on_event({"type": kind, **json.loads(json.dumps(fields))})

        return run_guarded(lambda: JOBS.load(job)(model, emit), emit)

    monkeypatch.setattr(child, "run_job", run_job)
    return requests


@pytest.fixture
def folder(tmp_path):
    save_transformer(
        WanTransformer(TransformerConfig(**SIZES), seed=0), tmp_path / "base.safetensors"
    )
    for slot in (1, 2, 4):
        modules = {}
        for name in PARTS.modules(slot):
            outputs, inputs = (48, 24) if name.endswith("ffn.0") else (24, 24)
            inputs = 48 if name.endswith("ffn.2") else inputs
            random = torch.Generator().manual_seed(slot)
            down, up = torch.randn(2, inputs, generator=random), torch.randn(outputs, 2)
            modules[name] = LoRAFactors(down, up, 2.0)
        header = loraid_metadata(PARTS, slot, expert=None)
        path = tmp_path / "loras" / f"slot{slot}.safetensors"
        save_adapter(modules, path, dtype=torch.float32, metadata=header)
    return tmp_path


def menma(*words) -> int:
    return run([str(word) for word in words])


def test_a_plan_as_a_table(capsys):
    words = ["loraid", "plan", "--variant", "wan2.1-t2v-14b", "--slots", 20]
    assert menma(*words, "--allocation", "spread", "--rank", 256) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].split() == ["SLOT", "LAYERS", "PARAMETERS", "WHERE"]
    assert len(lines) == 21
    assert lines[1].split()[:3] == ["1", "20", "61,341,696"]
    assert "self_attn.q, self_attn.k in blocks 0,20" in lines[1]
    assert "rank 640 would give it" in told.err
    assert "useful ranks: 128 to 256" in told.err
    assert "up to 117 MiB in bf16" in told.err


def test_a_plan_as_json(capsys):
    assert menma("loraid", "plan", "--variant", "wan2.1-t2v-1.3b", "--slots", 90, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["num_blocks"], plan["num_units"], plan["slots"]) == (30, 180, 90)
    assert plan["table"][0]["parameters_per_rank"] == 2 * 6144 * 2 // 2
    assert plan["table"][2]["modules"] == ["blocks.0.ffn.0", "blocks.0.ffn.2"]
    assert plan["table"][2]["parameters"] == 2 * 10_496 * plan["rank"]
    notes = " ".join(plan["notes"])
    assert "90 slots leave each 1.1% of the network" in notes
    assert "1.7 times the parameters of the smallest" in notes


def test_a_plan_without_sizes_counts_layers(capsys):
    assert menma("loraid", "plan", "--blocks", 7, "--slots", 7, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [len(row["modules"]) for row in plan["table"]] == [10] * 7
    assert plan["table"][0]["parameters"] is None
    assert "not known without the model's sizes" in " ".join(plan["notes"])


def test_a_plan_of_a_config_takes_its_model_and_its_slots(folder, capsys):
    config = folder / "a.toml"
    config.write_text(
        f'[model]\nvariant = "wan2.1-t2v-1.3b"\ntransformer = "{folder}/base.safetensors"\n'
        "[adapter]\nrank = 8\n[adapter.loraid]\nslot = 1\nslots = 4\n"
    )
    assert menma("loraid", "plan", config, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["num_blocks"], plan["slots"], plan["rank"]) == (2, 4, 8)
    assert plan["table"][0]["modules"] == list(PARTS.modules(1))
    assert plan["table"][0]["parameters"] == 8 * (2 * 48 * 3)
    assert menma("loraid", "plan", config, "--slots", 12, "--json") == 0
    assert json.loads(capsys.readouterr().out)["slots"] == 12


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slots", 3], "name the model once"),
        (["--slots", 3, "--blocks", 4, "--variant", "wan2.1-t2v-14b"], "name the model once"),
        (["--blocks", 4], "--slots is missing"),
        (["--blocks", 4, "--slots", 25], "use 1 to 24"),
        (["--blocks", 4, "--slots", 3, "--allocation", "spread"], "use 1, 2, 4, 8, 12, 24"),
        (["--blocks", 4, "--slots", 3, "--granularity", "blok"], "did you mean 'block'?"),
        (["--variant", "wan2.1-t2v-15b", "--slots", 3], "unknown model variant"),
        (["--blocks", 4, "--slots", 3, "--set", "a.b=1"], "none is given"),
    ],
)
def test_what_cannot_be_planned_is_told(words, told, capsys):
    assert menma("loraid", "plan", *words) == 2
    assert told in capsys.readouterr().err


def test_verify_says_disjoint_and_what_is_free(folder, jobs_here, capsys):
    files = [folder / "loras" / f"slot{slot}.safetensors" for slot in (1, 2, 4)]
    assert menma("lora", "verify", *files) == 0
    out = capsys.readouterr().out
    assert "free slots: 3" in out
    assert out.splitlines()[-1] == "disjoint"
    assert menma("lora", "verify", *files, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"disjoint", "files", "overlaps", "disagreements", "free"}
    assert report["free"] == {"none": [3]}


def test_verify_ends_with_1_where_files_overlap(folder, jobs_here, capsys):
    path = folder / "loras" / "slot1.safetensors"
    copy = folder / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    assert menma("lora", "verify", path, copy) == 1
    out = capsys.readouterr().out
    assert f"OVERLAP: {path} and {copy}: 6 layers: " in out
    assert out.splitlines()[-1] == "not disjoint"
    assert menma("lora", "verify", path, copy, "--json") == 1
    assert json.loads(capsys.readouterr().out)["overlaps"][0]["num_modules"] == 6


def test_verify_names_files_that_are_not_there_or_no_loras(folder, jobs_here, capsys):
    assert menma("lora", "verify", folder / "gone.safetensors") == 2
    assert "gone.safetensors" in capsys.readouterr().err
    assert menma("lora", "verify", folder / "base.safetensors") == 2
    assert "base.safetensors" in capsys.readouterr().err


def test_merge_takes_several_slots_with_their_strengths(folder, jobs_here, capsys):
    output = folder / "merged.safetensors"
    words = ["merge", "--base", folder / "base.safetensors", "--loraid", 4, 1, 2]
    words += ["--loraid-strength", 1, -0.5, 0, "--loraid-from", folder / "loras", "-o", output]
    assert menma(*words) == 0
    assert capsys.readouterr().out.strip() == str(output)
    direct = folder / "direct.safetensors"
    uses = [
        {"path": folder / "loras" / f"slot{slot}.safetensors", "strength": strength}
        for slot, strength in ((1, -0.5), (4, 1.0))
    ]
    from trainer.contract.lora_use import LoRAUse

    merge_loras(folder / "base.safetensors", [LoRAUse(**use) for use in uses], direct)
    first, second = load_file(output), load_file(direct)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_merge_names_a_slot_that_is_missing_and_writes_nothing(folder, jobs_here, capsys):
    output = folder / "merged.safetensors"
    words = ["merge", "--base", folder / "base.safetensors", "--loraid", 1, 3]
    assert menma(*words, "--loraid-from", folder / "loras", "-o", output) == 2
    told = capsys.readouterr().err
    assert "there is no file of slot 3" in told
    assert "slots 1, 2, 4 are there" in told
    assert not output.exists()


def test_slots_on_the_command_line_are_written_out():
    line = ["a.toml", "--loraid", "1", "2@low_noise", "3,4", "--loraid-strength", "-0.5", "1e-1"]
    assert spread([*line, "--steps", "5", "b"]) == [
        "a.toml", "--loraid=1", "--loraid=2@low_noise", "--loraid=3", "--loraid=4",
        "--loraid-strength=-0.5", "--loraid-strength=1e-1", "--steps", "5", "b",
    ]  # fmt: skip
    assert spread(["--loraid", "1", "a.toml"]) == ["--loraid=1", "a.toml"]
    assert spread(["--loraid=1", "--", "--loraid", "1"]) == ["--loraid=1", "--", "--loraid", "1"]
    assert spread(["--loraid", "x"]) == ["--loraid", "x"]
    assert spread(["--loraid"]) == ["--loraid"]


def test_one_strength_is_for_all_slots(tmp_path):
    fields = loraid_fields(["1", "2@high_noise"], ["0.5"], [tmp_path])
    assert fields == {
        "loraids": [
            {"slot": 1, "strength": 0.5},
            {"slot": 2, "expert": "high_noise", "strength": 0.5},
        ],
        "loraid_from": [str(tmp_path)],
    }
    assert [use["strength"] for use in loraid_fields(["1", "2"], [], [tmp_path])["loraids"]] == [
        1,
        1,
    ]
    assert loraid_fields(None, None, None) == {}


@pytest.mark.parametrize(
    ("slots", "strengths", "sources", "told"),
    [
        (["1", "2", "3"], ["1", "2"], ["."], "2 strengths for 3 slots"),
        (["1", "1"], [], ["."], "slot 1 is given twice"),
        (["0"], [], ["."], "'0' is no slot"),
        (["one"], [], ["."], "'one' is no slot"),
        (["1@both"], [], ["."], "'1@both' is no slot"),
        (["1"], ["full"], ["."], "'full' is no number"),
        (["1"], [], [], "does not say where the files"),
        (["1"], [], ["gone"], "no such file or folder"),
        ([], ["1"], [], "--loraid-strength needs --loraid"),
        ([], [], ["."], "--loraid-from needs --loraid"),
    ],
)
def test_mistakes_with_slots_are_told(slots, strengths, sources, told, tmp_path):
    with pytest.raises(UserError, match=told):
        loraid_fields(slots, strengths, [tmp_path / source for source in sources])
