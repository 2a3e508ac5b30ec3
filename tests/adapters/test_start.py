"""Training that starts from a file goes on where that file's training ended, for every kind."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, merge_into
from trainer.adapters.formats.writer import save_adapter
from trainer.contract.adapter_start import SINGLORA_KEY, STATE_KEYS, VERA_KEY, stored_kind
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.memory_model.trained import find_targets
from trainer.contract.stored_kinds import STORED_KINDS
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.engine.process_group import World
from trainer.jobs.train_parts import assemble_model, build_engine

from .kinds import make_updates
from .test_kind_files import PEFT_CONFIGS, SHAPES, TARGETS, peft_folder
from .tiny_models import batch, make_transformer, make_twin, model_inputs, run, run_twin

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=3, device=torch.device("cpu"), total_steps=4
)
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 2.0, "rank_pattern": {r".*\.q": 2}},
    "lora, rs": {"rank": 3, "alpha": 2.0, "rslora": True},
    "dora": {"rank": 3, "alpha": 2.0, "rank_pattern": {r".*\.q": 2}},
    "loha": {"rank": 2, "alpha": 3.0},
    "lokr": {"rank": 1, "alpha": 3.0},
    "lokr, both cut": {"rank": 1, "alpha": 3.0, "decompose_both": True},
    "lokr, whole": {"rank": 100},
    "lokr, by 3": {"rank": 2, "factor": 3, "alpha": 1.0},
    "tlora": {"rank": 4, "alpha": 2.0, "min_rank": 2},
    "singlora": {"rank": 3, "alpha": 2.0, "ramp_steps": 2},
    "ggpo": {"rank": 3, "alpha": 2.0},
    "vera": {"rank": 5},
}
KEPT = {"tlora": {"min_rank": 2}, "singlora": {"ramp_steps": 0}}
"""What has to be said again, or anew, beside the file."""


LAYOUTS = [
    (case, layout)
    for case in (*CASES, "relora")
    for layout in ("comfy", "peft")
    if layout in STORED_KINDS[stored_kind(case.partition(",")[0])].written
]


def config_of(kind: str, **options: Any) -> RunConfig:
    adapter = {"kind": kind, "targets": "attention", **options}
    if options.get("rank") == "from_weights":
        del adapter["targets"]
    return RunConfig.model_validate(
        {
            "adapter": adapter,
            "distributed": {"engine": "local"},
            "memory": {"weight_format": "fp32"},
            "optimizer": {"learning_rate": 0.05},
        }
    )


def begun(kind: str, build: BuildContext = BUILD, **options: Any) -> Any:
    return assemble_model(config_of(kind, **options), build, 1, make_transformer)


def trained(kind: str, steps: int = STEPS, **options: Any) -> Any:
    model = begun(kind, **options)
    engine = build_engine(config_of(kind, **options), model, BUILD, World.alone())
    for step in range(1, steps + 1):
        engine.forward_backward([batch(step)])
        engine.update(0.05)
        for technique in model.techniques:
            technique.after_step(step)
    return model


def written(
    model: Any, path: Any, layout: str = "kohya", dtype: torch.dtype = torch.float32
) -> Any:
    state = {name: value.detach() for name, value in model.adapter.trainable().items()}
    metadata = {"menma.kind": "lora"}
    model.adapter.write_output(state, path, layout=layout, dtype=dtype, metadata=metadata)
    return path


def predicted(model: Any) -> torch.Tensor:
    model.transformer.eval()
    with torch.no_grad():
        return run(model.transformer, model_inputs(model.transformer))


def loss_of(model: Any, kind: str) -> float:
    engine = build_engine(config_of(kind), model, BUILD, World.alone())
    return float(engine.forward_backward([batch(9)])["loss"])


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_bit_for_bit(tmp_path, case):
    kind = case.partition(",")[0]
    before = trained(kind, **CASES[case])
    path = written(before, tmp_path / "old.safetensors")
    after = begun(kind, init_from=str(path), rank="from_weights", **KEPT.get(kind, {}))
    ours, theirs = after.adapter.trainable(), before.adapter.trainable()
    assert ours.keys() == theirs.keys()
    close = {"rtol": 1e-6, "atol": 0} if kind == "vera" else {"rtol": 0, "atol": 0}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **close)
    assert any(bool(value.any()) for value in ours.values())
    close = {"rtol": 1e-5, "atol": 1e-5} if kind == "vera" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(predicted(after), predicted(before), **close)
    fresh = begun(kind, **CASES[case])
    assert (predicted(fresh) - predicted(after)).abs().max() > 1e-2
    for model in (before, after, fresh):
        model.step.train()
    if kind == "ggpo":
        return  # its noise begins without the gradients' share, as in any first step
    assert loss_of(after, kind) == pytest.approx(loss_of(before, kind), rel=1e-6)
    assert loss_of(fresh, kind) != pytest.approx(loss_of(before, kind), rel=1e-3)


@pytest.mark.parametrize(("case", "layout"), LAYOUTS)
def test_the_update_is_that_of_any_layout_at_any_scale(tmp_path, case, layout):
    kind = case.partition(",")[0]
    options = CASES.get(case, {"rank": 2, "restart_every_steps": 2, "restart_warmup_steps": 1})
    before = trained(kind, **options)
    path = written(before, tmp_path / "old.safetensors", layout)
    own = {"alpha": 7.0} if kind != "vera" else {}
    own |= {"rank": 1} if kind == "relora" else {}
    after = begun(kind, init_from=str(path), **{**options, **own, **KEPT.get(kind, {})})
    torch.testing.assert_close(predicted(after), predicted(before), rtol=1e-4, atol=1e-4)
    # And what it writes is the same again.
    again = load_adapter(written(after, tmp_path / "new.safetensors", layout))
    for name, update in load_adapter(path).items():
        weight = torch.zeros(update.shape) if kind != "dora" else torch.ones(update.shape)
        torch.testing.assert_close(
            again[name].added_to(weight), update.added_to(weight), rtol=1e-5, atol=1e-6
        )


def test_relora_freezes_the_whole_file_and_trains_the_next_part(tmp_path):
    options = {"restart_every_steps": 2, "restart_warmup_steps": 1}
    path = written(trained("relora", rank=2, **options), tmp_path / "old.safetensors")
    assert {update.rank for update in load_adapter(path).values()} == {4}
    model = trained("relora", steps=1, rank=3, init_from=str(path), **options)
    for name, part in model.adapter.frozen_parts().items():
        update = load_adapter(path)[name]
        assert torch.equal(part.down, update.down_RI)
        torch.testing.assert_close(part.up, update.up_OR, rtol=0, atol=0)
        assert not part.down.requires_grad
    new = load_adapter(written(model, tmp_path / "new.safetensors"))
    assert {update.rank for update in new.values()} == {7}
    (restarts,) = (t for t in model.techniques if hasattr(t, "_restart"))
    again = begun("relora", rank=3, init_from=str(path), **options)
    for part in again.adapter.frozen_parts().values():
        part.down.zero_()
    again.techniques[-1].load_state_dict(restarts.state_dict())
    parts = model.adapter.frozen_parts()
    assert all(torch.equal(p.down, parts[n].down) for n, p in again.adapter.frozen_parts().items())


def test_singlora_takes_the_share_that_the_file_was_faded_in_to(tmp_path):
    before = trained("singlora", rank=3, ramp_steps=6, steps=3)
    path = written(before, tmp_path / "old.safetensors")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[SINGLORA_KEY]) == {"share": 0.5}
    after = begun("singlora", init_from=str(path), rank="from_weights", ramp_steps=0)
    torch.testing.assert_close(predicted(after), predicted(before), rtol=1e-5, atol=1e-5)
    name = next(iter(before.adapter.trainable()))
    ratio = after.adapter.trainable()[name] / before.adapter.trainable()[name]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5**0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["singlora", "vera", "dora", "loha", "lokr"])
def test_bf16_files_are_recognised(tmp_path, kind):
    before = trained(kind, **CASES[kind])
    path = written(before, tmp_path / "old.safetensors", dtype=torch.bfloat16)
    after = begun(kind, init_from=str(path), rank="from_weights", **KEPT.get(kind, {}))
    beside = make_transformer()
    attach(beside, load_adapter(path))
    with torch.no_grad():
        wanted = run(beside, model_inputs(beside))
    torch.testing.assert_close(predicted(after), wanted, rtol=0.02, atol=0.02)


def test_a_lora_of_any_origin_may_go_on_as_lora_ggpo_or_relora(tmp_path):
    for origin in ("vera", "singlora", "ggpo"):
        path = written(trained(origin, **CASES[origin]), tmp_path / f"{origin}.safetensors")
        beside = make_transformer()
        attach(beside, load_adapter(path))
        with torch.no_grad():
            wanted = run(beside, model_inputs(beside))
        for kind in ("lora", "ggpo", "relora"):
            rank = 2 if kind == "relora" else "from_weights"
            model = begun(kind, init_from=str(path), rank=rank)
            torch.testing.assert_close(predicted(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in PEFT_CONFIGS if "vera" not in case])
def test_files_of_peft(tmp_path, case):
    config, options = PEFT_CONFIGS[case]
    deltas = peft_folder(tmp_path, config(**options, **TARGETS), SHAPES)
    plain, kind = make_transformer(), case[:4]
    for name, delta in deltas.items():
        plain.get_parameter(f"{name}.weight").data += delta
    with torch.no_grad():
        wanted = run(plain, model_inputs(plain))
    model = begun(kind, init_from=str(tmp_path), rank="from_weights")
    assert set(model.adapter.plan) == set(SHAPES)
    torch.testing.assert_close(predicted(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_dora_that_diffusers_wrote(tmp_path):
    model = make_transformer()
    twin = make_twin(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, init_lora_weights=False, target_modules=["to_q"]
    )
    torch.manual_seed(0)
    twin.add_adapter(config, adapter_name="style")
    for name, parameter in twin.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    twin.save_lora_adapter(tmp_path, adapter_name="style")
    found = begun("dora", init_from=str(tmp_path), rank="from_weights")
    assert {plan.rank for plan in found.adapter.plan.values()} == {4}
    with torch.no_grad():
        wanted = run_twin(twin, model_inputs(model))
    torch.testing.assert_close(predicted(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr whole", "lokr cut twice", "dora"])
def test_files_in_the_layout_of_lycoris(tmp_path, kind):
    """Its keys (`lora_unet_….hada_w1_a`, `dora_scale`) and an alpha for each module."""
    path = tmp_path / "lycoris.safetensors"
    updates = make_updates(make_transformer(), kind, alpha=5.0)
    save_adapter(updates, path, layout="kohya", dtype=torch.float32)
    metadata = {"ss_network_module": "lycoris.kohya"}
    save_file(load_file(path), path, metadata=metadata)
    model = begun(kind.partition(" ")[0], init_from=str(path), rank="from_weights")
    merged = make_transformer()
    merge_into(merged, load_adapter(path))
    with torch.no_grad():
        wanted = run(merged, model_inputs(merged))
    torch.testing.assert_close(predicted(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [*CASES, "relora"])
def test_a_resumed_run_takes_no_weights_from_the_file(tmp_path, case):
    """They come from the checkpoint; the file may hold others by then."""
    kind = case.partition(",")[0]
    options = CASES.get(case, {"rank": 2})
    model = trained(kind, **options)
    path = written(model, tmp_path / "old.safetensors")
    rank = {"rank": options["rank"] if kind == "relora" else "from_weights"}
    resumed = BuildContext(
        variant=BUILD.variant, seed=3, device=BUILD.device, total_steps=4, resumes=True
    )
    kept = KEPT.get(kind, {})
    again = begun(kind, resumed, init_from=str(path), **rank, **kept)
    first = begun(kind, init_from=str(path), **rank, **kept)
    assert again.adapter.facts == first.adapter.facts
    shapes = [{n: p.shape for n, p in m.adapter.trainable().items()} for m in (again, first)]
    assert shapes[0] == shapes[1]
    fresh = make_transformer()
    attached = [named for named in again.adapter.plan if not named.startswith("blocks")]
    assert attached == []
    if kind != "singlora":  # whose fresh update is not 0
        with torch.no_grad():
            assert torch.equal(predicted(again), run(fresh, model_inputs(fresh)))


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_knows_the_sizes_of_the_file(tmp_path, case):
    kind = case.partition(",")[0]
    model = begun(kind, **CASES[case])
    path = written(model, tmp_path / "old.safetensors")
    config = config_of(kind, init_from=str(path), rank="from_weights", **KEPT.get(kind, {}))
    targets = find_targets(config, model.transformer.config)
    wanted = [tuple(value.shape) for value in model.adapter.trainable().values()]
    assert sorted(targets.shapes) == sorted(wanted)
    assert targets.parameters == sum(value.numel() for value in model.adapter.trainable().values())
    asked = find_targets(config_of(kind, **CASES[case]), model.transformer.config)
    assert (targets.held, targets.output) == (asked.held, asked.output)
    assert targets.blocks == asked.blocks


def test_every_kind_says_its_name():
    for name in ADAPTERS.names:
        if name != "none":
            assert ADAPTERS.load(name).kind == name


WRONG = [
    ("lora", "dora", {}, ["old.safetensors", "lacks the other factor of its layer (magnitude)"]),
    ("dora", "lora", {}, ["dora_scale", "no part of a plain LoRA"]),
    ("loha", "lokr", {}, ["hada_w1_a", "no part of a LoKr"]),
    ("lokr", "loha", {}, ["lokr_w1", "no part of a LoHa"]),
    ("loha", "relora", {"rank": 2}, ["hada_w1_a", "no part of a plain LoRA"]),
    ("dora", "ggpo", {}, ["dora_scale"]),
    ("tlora", "lora", {}, ["is a T-LoRA"]),
    ("tlora", "ggpo", {}, ["is a T-LoRA"]),
    ("ggpo", "tlora", {}, ["lack menma.tlora"]),
    ("ggpo", "vera", {}, ["lack menma.vera"]),
    ("lora", "vera", {}, ["different ranks: 3 (lora_unet_blocks_"]),
    ("lora", "singlora", {"ramp_steps": 0}, ["lack menma.singlora"]),
    ("tlora", "tlora", {}, ["adapter.min_rank", "trained with 2"]),
    ("vera", "vera", {"projection_seed": 4}, ["adapter.projection_seed", "trained with 0"]),
    ("loha", "loha", {"rank": 4}, ["old.safetensors", "hada_w1_a has rank 2"]),
    ("lokr", "lokr", {"rank": 2}, ["lokr_w1", "w2_a"]),
    ("lokr", "lokr", {"rank": 1, "factor": 2}, ["lokr_w1", "factor"]),
    ("dora", "dora", {"rank": 3}, ["lora_down.weight has rank 2"]),
    ("loha", "loha", {"rank": 2, "targets": "all"}, ["lacks", "ffn"]),
    ("loha", "loha", {"rank": 2, "targets": "self_attention"}, ["would be lost", "cross_attn"]),
    ("relora", "relora", {"rank": 2, "targets": "ffn"}, ["would be lost"]),
]


@pytest.mark.parametrize(("origin", "kind", "options", "words"), WRONG)
def test_what_cannot_be_gone_on_from_is_refused_by_file_and_key(
    tmp_path, origin, kind, options, words
):
    path = written(begun(origin, **CASES.get(origin, {"rank": 2})),
                   tmp_path / "old.safetensors")  # fmt: skip
    with pytest.raises((ConfigError, ModelFileError)) as caught:
        begun(kind, init_from=str(path), **{"rank": "from_weights", **options})
    for word in words:
        assert word in str(caught.value)


def test_another_model_is_refused(tmp_path):
    for kind in ("loha", "lokr", "dora", "vera", "singlora", "ggpo", "tlora"):
        path = written(begun(kind, **CASES[kind]), tmp_path / f"{kind}.safetensors")
        config = config_of(kind, init_from=str(path), rank="from_weights", **KEPT.get(kind, {}))
        wider = make_transformer(dim=36, ffn_dim=48)
        with pytest.raises(ConfigError, match="is for another model"):
            assemble_model(config, BUILD, 1, lambda wider=wider: wider)
        with pytest.raises(ConfigError, match="is for another model"):
            find_targets(config, wider.config)


def rewritten(path: Any, tensors: Any = None, **metadata: str) -> None:
    with safe_open(path, "pt") as file:
        told = {**file.metadata(), **metadata}
    save_file(load_file(path) | (tensors or {}), path, metadata=told)


def test_what_is_not_what_its_metadata_say_is_refused(tmp_path):
    path = written(trained("lora", rank=5, alpha=5.0), tmp_path / "old.safetensors")
    rewritten(path, **{VERA_KEY: '{"rank": 5, "projection_seed": 0}', SINGLORA_KEY: '{"share": 1}'})
    with pytest.raises(ModelFileError, match=r"old\.safetensors.*random matrices"):
        begun("vera", init_from=str(path), rank="from_weights")
    with pytest.raises(ModelFileError, match=r"old\.safetensors.*one matrix"):
        begun("singlora", init_from=str(path), rank="from_weights", ramp_steps=0)
    for text, words in (
        ("{", "damaged"),
        ("[" * 9999, "damaged"),
        ("[]", "damaged"),
        ('{"rank": 9}', "for rank 9"),
    ):
        for kind, key in STATE_KEYS.items():
            rewritten(path, **dict.fromkeys(STATE_KEYS.values(), text))
            with pytest.raises(ConfigError, match=words) as caught:
                begun(kind, init_from=str(path), rank="from_weights")
            assert key in str(caught.value)
