"""LoRAs attached, merged while sampling, merged into a file: one model; and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.kinds import KINDS, changed, make_updates
from tests.sampling.test_sample_loras import answer, request, transformer, write_lora
from trainer.adapters import load_adapter
from trainer.adapters.apply import merge_into
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.rank_mask import RankSchedule
from trainer.adapters.targets import linear_layers
from trainer.contract.adapter_start import TLORA_KEY
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.lora_use import LoRAUse, SampleLoRA
from trainer.contract.variants import get_variant
from trainer.jobs.merge import merge_loras
from trainer.jobs.merge_weights import Rounding
from trainer.jobs.sample_lora_checks import check_compiled, check_loras, check_merge
from trainer.jobs.sample_loras import LoRASwitch
from trainer.models import load_transformer
from trainer.models.wan.loading import save_transformer

T2V = get_variant("wan2.1-t2v-1.3b")
PAIR = get_variant("wan2.2-t2v-a14b")


def switched(
    uses: tuple[LoRAUse, ...], model: nn.Module, *, merges: bool, told: Any = None
) -> Tensor:
    on_merge = (lambda expert, rounding: told.append(rounding)) if told is not None else None
    extra = {"on_merge": on_merge} if on_merge else {}
    switch = LoRASwitch(uses, has_experts=False, merges=merges, **extra)
    switch.begin(request())
    result = answer(switch.ready(model, "low_noise"))
    assert torch.equal(answer(switch.ready(model, "low_noise")), result), "not merged twice"
    return result


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_attached_and_merged_is_the_formula(
    tmp_path: Path, kind: str, layout: str
) -> None:
    updates = make_updates(transformer(), kind, size=0.15)
    path = tmp_path / "lora.safetensors"
    save_adapter(updates, path, layout=layout, dtype=torch.float32)
    exact = transformer().double()
    with torch.no_grad():
        for name, layer in linear_layers(exact).items():
            if name in updates:
                layer.weight.copy_(changed(updates[name], layer.weight, 0.7))
    wanted = answer(exact.float())
    uses = (LoRAUse(path=path, strength=0.7),)
    far = (wanted - answer(transformer())).abs().max()
    assert far > 0.05, "the LoRA does something"
    for merges in (False, True):
        found = switched(uses, transformer(), merges=merges)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def test_merged_while_sampling_is_the_merged_file(tmp_path: Path) -> None:
    model = transformer()
    model.variant_name = T2V.name
    save_transformer(model, tmp_path / "base.safetensors")
    uses = (
        LoRAUse(path=write_lora(tmp_path / "one.safetensors", 1), strength=0.8),
        LoRAUse(path=write_lora(tmp_path / "two.safetensors", 2), strength=-0.5),
    )
    for dtype in (torch.float32, torch.bfloat16):
        merge_loras(
            tmp_path / "base.safetensors", uses, tmp_path / "m.safetensors", dtype=dtype, force=True
        )
        file = load_transformer(tmp_path / "m.safetensors", dtype=dtype)
        told: list[Rounding] = []
        loaded = load_transformer(tmp_path / "base.safetensors", dtype=dtype)
        found = switched(uses, loaded.eval(), merges=True, told=told)
        wanted = file.eval().state_dict()
        if dtype == torch.float32:
            for name, tensor in loaded.state_dict().items():
                torch.testing.assert_close(tensor, wanted[name], msg=name)
            assert told[0].of_update < 1e-5
        else:
            # A bf16 base was rounded before the sum.
            assert 1e-4 < told[0].of_update < 0.5
        torch.testing.assert_close(found, answer(file), atol=0.05, rtol=0.05)


def test_in_bf16_merging_is_as_near_to_the_exact_model_as_its_rounding_says(tmp_path: Path) -> None:
    use = LoRAUse(path=write_lora(tmp_path / "one.safetensors", 1))
    exact = switched((use,), transformer(), merges=False)
    attached = switched((use,), transformer().bfloat16(), merges=False).float()
    merged = switched((use,), transformer().bfloat16(), merges=True).float()
    plain = answer(transformer()).float()
    added = (exact - plain).norm()
    assert (attached - exact).norm() < 0.2 * added
    assert (merged - exact).norm() < 0.2 * added


def test_two_loras_on_one_weight_are_rounded_once(tmp_path: Path) -> None:
    paths = [write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    model = transformer().bfloat16()
    switched(tuple(LoRAUse(path=path) for path in paths), model, merges=True)
    exact = transformer().bfloat16().float()
    for path in paths:
        merge_into(exact, load_adapter(path))
    for name, tensor in model.state_dict().items():
        wanted = exact.state_dict()[name].bfloat16()
        assert torch.equal(tensor, wanted), name


def tlora(path: Path) -> Path:
    schedule = RankSchedule(rank=4, min_rank=1, exponent=1.0)
    return write_lora(path, 3, **{TLORA_KEY: schedule.in_words()})


def test_what_cannot_be_merged_says_why(tmp_path: Path) -> None:
    plain = LoRAUse(path=write_lora(tmp_path / "plain.safetensors", 1))
    fading = SampleLoRA(path=plain.path, schedule=((0.0, 1.0), (1.0, 0.0)))
    config = RunConfig.model_validate({})
    check_merge((plain,), [request(), request((1.0,))], config)
    fp8 = RunConfig.model_validate({"memory": {"weight_format": "fp8_scaled"}})
    for uses, requests, of, words in (
        ((plain,), [request()], fp8, "weight_format is fp8_scaled"),
        ((fading,), [request()], config, "changes from step to step"),
        ((plain,), [request(), request((0.5,))], config, "differ from sample to sample"),
        ((LoRAUse(path=tlora(tmp_path / "t.safetensors")),), [request()], config, "is a T-LoRA"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            check_merge(uses, requests, of)
        assert "--merge" in caught.value.hint


def test_compiled_blocks_take_few_strengths(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "plain.safetensors", 1)
    compiled = RunConfig.model_validate({"memory": {"compile_blocks": True}})
    jump = SampleLoRA(path=path, schedule=((0.0, 1.0), (0.5, 1.0), (0.5, 0.0)))
    pair = SampleLoRA(path=path, strength_high_noise=0.5)
    falling = SampleLoRA(path=path, schedule=((0.0, 1.0), (1.0, 0.0)))
    four = [request((float(strength),)) for strength in range(4)]
    check_compiled((jump,), [request()], T2V, compiled)
    check_compiled((pair,), [request()], PAIR, compiled)
    check_compiled((jump,), four, T2V, compiled)
    check_compiled((falling,), four, T2V, RunConfig.model_validate({}))
    steps = request().num_steps
    with pytest.raises(ConfigError, match=f"anew for each strength .* have {steps}"):
        check_compiled((falling,), [request()], T2V, compiled)
    with pytest.raises(ConfigError, match="have 5"):
        check_compiled((LoRAUse(path=path),), [*four, request((9.0,))], T2V, compiled)


@pytest.fixture
def bases(tmp_path: Path) -> dict[Any, Path]:
    paths: dict[Any, Path] = {}
    for expert in ("low_noise", "high_noise"):
        model = transformer()
        model.variant_name = T2V.name
        paths[expert] = tmp_path / f"base_{expert}.safetensors"
        save_transformer(model, paths[expert])
    return paths


def test_loras_that_do_not_fit_are_refused_by_their_headers(
    tmp_path: Path, bases: dict[Any, Path]
) -> None:
    low = {"low_noise": bases["low_noise"]}
    fits = write_lora(tmp_path / "fits.safetensors", 1)
    assert check_loras([LoRAUse(path=fits)], T2V, low) == []
    updates = make_updates(transformer(), "lora", ["blocks.1.ffn.0"])
    far = tmp_path / "far.safetensors"
    save_adapter(
        {"blocks.7.ffn.0": updates["blocks.1.ffn.0"]}, far, layout="comfy", dtype=torch.float32
    )
    with pytest.raises(
        ModelFileError, match=r"far.safetensors is for another model.*blocks.7.ffn.0"
    ):
        check_loras([LoRAUse(path=fits), LoRAUse(path=far)], T2V, low)
    with pytest.raises(ConfigError, match=r"given for the high_noise expert, and wan2.1.* has one"):
        check_loras([LoRAUse(path=fits, expert="high_noise")], T2V, low)
    with pytest.raises(ConfigError, match="a strength for each expert"):
        check_loras([SampleLoRA(path=fits, strength_high_noise=0.5)], T2V, low)


def test_loras_for_the_other_expert_are_named(tmp_path: Path, bases: dict[Any, Path]) -> None:
    told = write_lora(tmp_path / "told.safetensors", 1, **{"menma.expert": "low_noise"})
    (note,) = check_loras([LoRAUse(path=told)], T2V, {"low_noise": bases["low_noise"]})
    assert f"{told} says that it is for the low_noise expert of Wan 2.2" in note
    (note,) = check_loras([LoRAUse(path=told)], PAIR, bases)
    assert "no LoRA is for the high_noise expert" in note
    notes = check_loras([LoRAUse(path=told, expert="high_noise")], PAIR, bases)
    assert "says that it is for the low_noise expert, and is used with high_noise" in notes[0]
    assert "no LoRA is for the low_noise expert" in notes[1]
    slot = write_lora(tmp_path / "slot.safetensors", 2, ss_loraid_expert="high")
    assert check_loras([LoRAUse(path=told), LoRAUse(path=slot)], PAIR, bases) == []
    both = write_lora(tmp_path / "both.safetensors", 3)
    assert check_loras([LoRAUse(path=both)], PAIR, bases) == []
