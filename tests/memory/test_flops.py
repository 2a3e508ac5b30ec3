"""Operations of a step against a published table, and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.flops import step_flops
from trainer.contract.memory_model.workload import workload_of
from trainer.models.wan.random_weights import random_transformer

# TFLOP of a LoRA step of one sample, worked out apart from the code: forward, forward and backward
# without anything computed twice, and with every block recomputed.
TABLE = [
    ("wan2.1-t2v-1.3b", 832, 480, 283, 774, 1160),
    ("wan2.2-ti2v-5b", 1280, 720, 290, 718, 1076),
    ("wan2.1-t2v-14b", 480, 480, 755, 1824, 2734),
    ("wan2.1-t2v-14b", 832, 480, 1678, 4275, 6408),
    ("wan2.1-t2v-14b", 1280, 720, 6523, 17818, 26718),
]


def flops(variant="wan2.1-t2v-14b", size=(832, 480), frames=81, **sections):
    source = {"video_directory": "c", "resolution": list(size), "target_frames": [frames]}
    values = {
        "model": {"variant": variant},
        "dataset": {"sources": [source]},
        "adapter": {"rank": 32},
        **sections,
    }
    return step_flops(workload_of(RunConfig.model_validate(values)))


@pytest.mark.parametrize(("variant", "width", "height", "forward", "needed", "computed"), TABLE)
def test_operations_are_those_of_the_table(variant, width, height, forward, needed, computed):
    found = flops(variant, (width, height))
    assert found.forward / 1e12 == pytest.approx(forward, rel=0.015)
    assert found.needed / 1e12 == pytest.approx(needed, rel=0.005)
    assert found.computed / 1e12 == pytest.approx(computed, rel=0.01)


def test_what_is_needed_does_not_depend_on_how_memory_is_saved():
    plain = flops()
    for memory in (
        {"gradient_checkpointing": False},
        {"keep_attention": True},
        {"feed_forward_chunks": 4},
        {"weight_format": "fp8_scaled"},
    ):
        other = flops(memory=memory)
        assert (other.forward, other.needed) == (plain.forward, plain.needed)
        if "weight_format" not in memory:
            assert other.computed != plain.computed
    none = flops(memory={"gradient_checkpointing": False})
    assert none.computed == pytest.approx(none.needed + 0.5 * none.attention)


def test_microbatches_count_each():
    once, thrice = flops(), flops(training={"gradient_accumulation_steps": 3})
    assert thrice.needed == pytest.approx(3 * once.needed)


def test_a_full_finetune_has_the_gradients_of_weights_too():
    found = flops(adapter={"kind": "none"})
    assert found.lora == 0
    assert found.needed == pytest.approx(3 * found.forward)


def test_torch_counts_the_same_products():
    # Narrow text, so that the embeddings, which the formula leaves out, hardly count.
    shape = {"dim": 256, "ffn_dim": 1024, "num_heads": 2, "num_layers": 4, "text_dim": 8}
    given = {"variant": "wan2.1-t2v-1.3b", "shape": shape}
    source = {"video_directory": "c", "resolution": [256, 256], "target_frames": [9]}
    config = {"model": given, "dataset": {"sources": [source]}, "adapter": {"kind": "none"}}
    work = workload_of(RunConfig.model_validate(config))
    model = random_transformer(work.shape, dtype=torch.float32, device="cpu")
    latents, context = torch.randn(1, 16, 3, 32, 32), torch.randn(1, 512, 8)
    # The counter knows no CPU attention but the one that is written in products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, torch.tensor([500.0]), context)
    assert step_flops(work).forward == pytest.approx(counter.get_total_flops(), rel=0.03)
