"""LoHa, LoKr and DoRA trained: streamed, recomputed, in fp8, sharded; and what they write."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.engine.toy import AdamWFactory, make_batch
from tests.models.wan_pairs import build as build_model
from tests.models.wan_pairs import run_ours
from tests.swap.ordered_streams import OrderedStreams, Watch
from tests.swap.swapped_models import CONFIG, assert_equal, inputs, loss_of
from tests.swap.swapped_models import train as train_streamed
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.dora import DoRA
from trainer.adapters.loha import LoHa
from trainer.adapters.lokr import LoKr
from trainer.contract.catalog import ADAPTERS
from trainer.contract.stored_kinds import STORED_KINDS
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.local import LocalEngine
from trainer.memory.block_swap import BlockSwap
from trainer.models.wan.quantised import is_block_linear, replace_layer
from trainer.quant.fp8 import Fp8Spec, quantise

from .tiny_models import make_transformer, model_inputs, run

ADAPTER = {"loha": LoHa, "lokr": LoKr, "dora": DoRA}
KINDS = tuple(ADAPTER)
OPTIONS = {
    "loha": {"rank": 3, "alpha": 2.0},
    "lokr": {"rank": 2, "alpha": 3.0, "decompose_both": True},
    "dora": {"rank": 3, "alpha": 6.0},
}


def inject(model, build, kind, *, seed=0, stirred=False, **options):
    adapter_class = ADAPTER[kind]
    adapter = adapter_class(adapter_class.Config(**{**OPTIONS[kind], **options}), build)
    adapter.inject(model, seed)
    if stirred:
        random = torch.Generator().manual_seed(0)
        for value in adapter.trainable().values():
            value.data += torch.randn(value.shape, generator=random) * 0.1
    return adapter


def make_model(build, kind, *, swap=0, streams=None, checkpointing=True, layers=4):
    model = build_model(replace(CONFIG, num_layers=layers)).requires_grad_(False)
    if swap:
        model.blocks.swap = BlockSwap(model.blocks, swap, streams)
    adapter = inject(model, build, kind, stirred=True)
    model.gradient_checkpointing = checkpointing
    return model, adapter.trainable()


@pytest.mark.parametrize("kind", KINDS)
def test_catalog_names_it(kind):
    assert ADAPTERS.load(kind) is ADAPTER[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_unchanged_at_the_start_and_after_removal(transformer, build, kind):
    batch = model_inputs(transformer)
    before, state = run(transformer, batch), dict(transformer.state_dict())
    adapter = inject(transformer, build, kind)
    assert torch.equal(run(transformer, batch), before)
    learning = {id(p) for p in transformer.parameters() if p.requires_grad}
    assert learning == {id(p) for p in adapter.trainable().values()}
    for parameter in adapter.trainable().values():
        parameter.data += 0.1
    assert not torch.allclose(run(transformer, batch), before, atol=1e-3)
    adapter.set_strength(0.0)
    assert torch.equal(run(transformer, batch), before)
    adapter.remove()
    assert torch.equal(run(transformer, batch), before)
    assert list(transformer.state_dict()) == list(state)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_tensors_depend_on_seed_and_name_alone(build, kind):
    full = inject(make_transformer(), build, kind, seed=5).trainable()
    part = inject(make_transformer(), build, kind, seed=5, exclude=(r"blocks\.0\..*",)).trainable()
    other = inject(make_transformer(), build, kind, seed=6).trainable()
    assert all(torch.equal(full[name], value) for name, value in part.items())
    drawn = {"loha": "w1_b", "lokr": "w2_a", "dora": "down"}[kind]
    name = f"blocks.2.ffn.2.{drawn}"
    assert not torch.equal(full[name], other[name])
    assert not torch.equal(full[name], full[f"blocks.1.ffn.2.{drawn}"])


def test_loha_starts_from_lycoris_normals_and_dora_from_the_rows_lengths(build):
    model = make_transformer()
    loha = inject(make_transformer(), build, "loha", rank=40).trainable()
    for name, std in (("w1_a", 0.1), ("w1_b", 1.0), ("w2_a", 0.0), ("w2_b", 1.0)):
        values = loha[f"blocks.0.ffn.0.{name}"].detach()
        assert values.std().item() == pytest.approx(std, rel=0.1)
    dora = inject(make_transformer(), build, "dora").trainable()
    weight = model.get_parameter("blocks.1.ffn.0.weight").detach()
    torch.testing.assert_close(
        dora["blocks.1.ffn.0.magnitude"].detach(), weight.norm(dim=1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"rank": 1}, {"w1", "w2_a", "w2_b"}),
        ({"rank": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
        ({"rank": 100}, {"w1", "w2"}),
        ({"rank": 2, "factor": 2}, {"w1", "w2_a", "w2_b"}),
    ],
)
def test_lokr_trains_whole_matrices_where_factors_would_be_no_smaller(build, options, names):
    model = make_transformer()
    only = {"exclude": (".*",), "include": (r"blocks\.0\.ffn\.0",), "alpha": 7.0}
    adapter = LoKr(LoKr.Config(**options, **only), build)
    adapter.inject(model, 0)
    assert {name.rpartition(".")[2] for name in adapter.trainable()} == names
    (update,) = adapter.updates(adapter.trainable()).values()
    assert update.scale == (1.0 if names == {"w1", "w2"} else 7.0 / options["rank"])
    assert update.shape == (48, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_and_recomputing_change_no_bit(build, kind):
    reference = train_streamed(*make_model(build, kind, checkpointing=False))
    for swap, checkpointing in ((3, True), (4, 2)):
        streams = OrderedStreams()
        model, trainable = make_model(
            build, kind, swap=swap, streams=streams, checkpointing=checkpointing
        )
        with Watch(streams):
            found = train_streamed(model, trainable)
        assert streams.faults == []
        assert_equal(found, reference)


def test_a_streamed_dora_starts_from_the_lengths_of_the_streamed_rows(build):
    plain = inject(build_model(CONFIG), build, "dora").trainable()
    model, streams = build_model(CONFIG), OrderedStreams()
    model.requires_grad_(False)
    model.blocks.swap = BlockSwap(model.blocks, 4, streams)
    with Watch(streams):
        streamed = inject(model, build, "dora").trainable()
    assert streams.faults == []
    assert model.blocks.swap.resident == ()
    assert all(torch.equal(plain[name], value) for name, value in streamed.items())


@pytest.mark.parametrize("kind", KINDS)
def test_attached_to_a_streamed_model(build, kind, tmp_path):
    model = build_model(replace(CONFIG, num_layers=4))
    adapter = inject(model, build, kind, stirred=True)
    path, state = tmp_path / "lora.safetensors", adapter.trainable()
    adapter.write_output(state, path, layout="kohya", dtype=torch.float32, metadata={})
    streamed = build_model(replace(CONFIG, num_layers=4)).requires_grad_(False)
    streams = OrderedStreams()
    streamed.blocks.swap = BlockSwap(streamed.blocks, 4, streams)
    attach(streamed, load_adapter(path))
    with torch.no_grad(), Watch(streams):
        for seed in (0, 1):
            torch.testing.assert_close(
                run_ours(streamed, inputs(seed)), run_ours(model, inputs(seed)),
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip
    assert streams.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compile(build, kind):
    results = []
    for compiled in (False, True):
        model, trainable = make_model(build, kind, layers=2)
        if compiled:
            model.blocks[0].compile(backend="aot_eager")
        loss_of(model, 0).backward()
        results.append([p.grad for p in trainable.values()])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-6)


def to_fp8(model):
    for name, value in list(model.named_parameters()):
        if is_block_linear(name, value.shape):
            spec = Fp8Spec(scaled=True)
            replace_layer(model, name.removesuffix(".weight"), quantise(value.data, spec), spec)
    return model


LAYOUTS = [(kind, layout) for kind in KINDS for layout in STORED_KINDS[kind].written]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_it_learns_and_the_written_file_is_what_was_trained(build, tmp_path, kind, layout):
    fp8 = layout == "comfy"
    model, goal = make_transformer(num_layers=1), make_transformer(num_layers=1)
    plain = make_transformer(num_layers=1)
    if fp8:
        model, plain = to_fp8(model), to_fp8(plain)
    random = torch.Generator().manual_seed(3)
    for name, value in goal.named_parameters():
        if name.endswith(("attn.q.weight", "ffn.0.weight")):
            value.data += torch.randn(value.shape, generator=random) * 0.3
    adapter = inject(model, build, kind, rank=8, alpha=8.0)
    optimizer = torch.optim.Adam(adapter.trainable().values(), lr=0.02)
    batch = model_inputs(model)
    with torch.no_grad():
        target = run(goal, batch)
    losses = []
    for _ in range(40):
        loss = (run(model, batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    path = tmp_path / "out.safetensors"
    state = {name: value.detach().clone() for name, value in adapter.trainable().items()}
    adapter.write_output(
        state, path, layout=layout, dtype=torch.float32, metadata={"menma.kind": "lora"}
    )
    read = load_adapter(path)
    assert {update.kind for update in read.values()} == {kind}
    assert read.notes == ()
    assert read.metadata["menma.kind"] == kind
    wanted = {"loha": "networks.loha", "lokr": "networks.lokr", "dora": "lycoris.kohya"}[kind]
    assert read.metadata["ss_network_module"] == wanted
    arguments = json.loads(read.metadata["ss_network_args"])
    assert arguments["rank"] == 8
    assert arguments.get("dora_wd", False) == (kind == "dora")
    attach(plain, read)
    # Beside an fp8 weight an attached adapter computes in bf16.
    close = {"rtol": 0.02, "atol": 0.02} if fp8 else {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(run(plain, batch), run(model, batch), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_is_never_written(transformer, build, tmp_path, kind):
    adapter = inject(transformer, build, kind)
    state = {n: p.detach().clone() for n, p in adapter.trainable().items()}
    name = next(n for n in state if n.startswith("blocks.1.ffn.0"))
    state[name].view(-1)[0] = math.nan
    with pytest.raises(Exception, match=r"blocks\.1\.ffn\.0"):
        adapter.write_output(
            state, tmp_path / "x", layout="comfy", dtype=torch.bfloat16, metadata={}
        )
    assert not list(tmp_path.iterdir())


class Step(nn.Module):
    """What engines wrap: a batch's number picks the inputs."""

    def __init__(self, build, kind):
        super().__init__()
        self.model, self.trained = make_model(build, kind, layers=2)

    def forward(self, batch):
        seed = int(batch.latents_BCFHW.flatten()[0].abs() * 1000)
        return {"loss": loss_of(self.model, seed)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_trains_as_one_process_does(build, world, kind):
    results = []
    for stage in (None, 3):
        step = Step(build, kind)
        options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
        arguments = (step, step.trained, AdamWFactory())
        if stage is None:
            engine = LocalEngine(*arguments, device="cpu", **options)
        else:
            engine = DeepSpeedEngine(
                *arguments, world=world, zero_stage=stage, full_finetune_bf16=False,
                persistence_threshold=0, **options,
            )  # fmt: skip
        losses = []
        for number in (1, 2):
            losses.append(engine.forward_backward([make_batch(number)])["loss"])
            engine.update(1e-2)
        results.append((losses, engine.full_parameters()))
        engine.close()
    (losses, parameters), (sharded_losses, sharded) = results
    assert sharded_losses == pytest.approx(losses, rel=1e-4)
    assert parameters.keys() == sharded.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=1e-4)
