"""Making quantised checkpoints: methods against each other, layouts, resuming, a permutation that changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from replicas.engine import EngineConfig
from replicas.engine.evaluation import agreement, measure, windows
from replicas.engine.loading import load
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.quantizers import Settings, quantize
from replicas.engine.quantizers import gptq as gptq_method
from replicas.engine.quantizers import rtn as rtn_method
from replicas.engine.quantizers.awq import quantise as clip
from replicas.engine.quantizers.awq import search_scales
from replicas.engine.quantizers.grid import Grid
from replicas.engine.quantizers.permute import permute
from replicas.engine.reference import Reference
from replicas.engine.weights import linear_matrices, open_checkpoint
from replicas.protocol import ConfigError

TEXT = [int(i) for i in torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(3))]
SMALL = {"group_size": 32, "samples": 8, "window": 32}


def small(method: str, **settings: object) -> Settings:
    return Settings(**{"method": method, **SMALL, **settings})  # type: ignore[arg-type]


def loud_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [48, 128] and inputs that are correlated and of very different sizes, as a model's are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 128, generator=generator) * torch.logspace(-1, 1, 128)
    x = torch.randn(2000, 24, generator=generator) @ mix + 0.1 * torch.randn(2000, 128, generator=generator)
    return torch.randn(48, 128, generator=generator), x


@pytest.mark.parametrize("order", gptq_method.ORDERS)
def test_gptq_changes_outputs_less_than_rounding_to_nearest(order: str) -> None:
    weight, x = loud_inputs()
    grid, hessian = Grid(4, 32, False), x.T @ x / len(x)

    def error(wide: torch.Tensor) -> float:
        return float(((x @ (wide - weight).T) ** 2).mean())

    plain = error(rtn_method.quantise(weight, grid).dequantise())
    assert error(gptq_method.quantise(weight, grid, hessian, order=order).dequantise()) < 0.5 * plain


def test_gptq_makes_up_for_what_rounded_layers_before_did_to_the_inputs() -> None:
    weight, exact = loud_inputs()
    given = 0.9 * exact + 0.05 * exact.roll(1, dims=1)
    hessian, cross = given.T @ given / len(given), exact.T @ given / len(given)

    def error(share: float) -> float:
        made = gptq_method.follow(weight, hessian, cross, share=share)
        return float(((given @ made.T - exact @ weight.T) ** 2).mean())

    assert error(1.0) < 0.1 * error(0.0)
    assert error(1.0) < error(0.5) < 0.5 * error(0.0)


def test_awq_scales_and_clips_to_less_error_than_rounding_to_nearest() -> None:
    weight, x = loud_inputs()
    grid, hessian = Grid(4, 32, False), x.T @ x / len(x)
    scales = search_scales(weight, grid, hessian, x.abs().mean(0))
    made = clip(weight * scales, grid, hessian / scales.outer(scales)).dequantise() / scales
    plain = rtn_method.quantise(weight, grid).dequantise()
    error, least = (float(((x @ (wide - weight).T) ** 2).mean()) for wide in (made, plain))
    assert error < 0.8 * least


@pytest.mark.parametrize(
    ("method", "bits", "layouts"),
    [
        ("rtn", 4, ("awq", "gptq", "compressed-tensors")),
        ("rtn", 8, ("gptq", "compressed-tensors")),
        ("gptq", 2, ("gptq",)),
        ("gptq", 4, ("gptq", "compressed-tensors")),
        ("awq", 4, ("awq", "gptq")),
    ],
)
def test_what_is_made_is_served_and_every_layout_holds_the_same_weights(
    small_model: Path, tmp_path: Path, method: str, bits: int, layouts: tuple[str, ...]
) -> None:
    found = []
    for layout in layouts:
        out = tmp_path / layout
        result = quantize(small_model, out, small(method, bits=bits), layout=layout, calibration=TEXT)
        assert result.file_bytes == (out / "model.safetensors").stat().st_size
        checkpoint = open_checkpoint(out)
        assert checkpoint.quantization == layout
        assert isinstance(checkpoint.matrix("model.layers.1.mlp.down_proj"), QuantizedWeight)
        found.append({name: checkpoint.tensor(f"{name}.weight") for name in linear_matrices(checkpoint.config)})
        stored = sum(
            tensor.nbytes
            for name, tensor in load_file(out / "model.safetensors").items()
            if name.split(".")[-2].endswith("_proj")
        )
        assert result.layer_bytes == stored, "scales, zeros and whatever else a layout stores are counted"
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())
    assert not list(tmp_path.glob("*.part*")), "nothing of the run is left beside its output"


def test_gptq_by_activation_order_is_read_back_through_its_groups(small_model: Path, tmp_path: Path) -> None:
    for order in ("none", "desc"):
        quantize(small_model, tmp_path / order, small("gptq", order=order), calibration=TEXT)
    assert json.loads((tmp_path / "desc" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    exact, checkpoint = open_checkpoint(small_model), open_checkpoint(tmp_path / "desc")
    name = "model.layers.0.mlp.down_proj"
    matrix = checkpoint.matrix(name)
    assert isinstance(matrix, QuantizedWeight)
    assert matrix.order is not None
    near = (checkpoint.tensor(f"{name}.weight") - exact.tensor(f"{name}.weight")).abs().mean()
    assert float(near) < 0.1, "weights of 0.3 on average, rounded to 4 bits in their own places"


def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_file(small_model: Path, tmp_path: Path) -> None:
    quantize(small_model, tmp_path / "whole", small("gptq"), calibration=TEXT)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        quantize(small_model, out, small("gptq"), calibration=TEXT, progress=stop)
    assert not out.exists(), "what is not whole is not there"
    seen: list[int] = []
    result = quantize(small_model, out, small("gptq"), calibration=TEXT, progress=lambda done, total: seen.append(done))
    assert (result.resumed_layers, seen) == (1, [1, 2])
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_layers_of_a_run_with_other_settings_are_not_taken_up(small_model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small_model, tmp_path / "out", small("rtn"), progress=stop)
    assert quantize(small_model, tmp_path / "out", small("rtn", bits=8)).resumed_layers == 0


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        (small("best"), None, "method 'best' is not known; use rtn, awq, gptq"),
        (small("awq", bits=8), None, "makes 4 bits, not 8"),
        (small("rtn", bits=3), None, "makes 2, 4, 8 bits, not 3"),
        (small("rtn", group_size=40), None, "has 64 inputs, not a multiple of group size 40"),
        (small("gptq", order="desc"), "awq", "cannot hold groups in the order 'desc'"),
        (small("rtn"), "gguf", "layout 'gguf' is not known"),
        (small("gptq"), None, "needs a calibration text"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    small_model: Path, tmp_path: Path, settings: Settings, layout: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(small_model, tmp_path / "out", settings, layout=layout)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_quantised_twice(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        quantize(small_model, out, small("rtn"))
    assert (out / "notes.txt").read_text() == "mine"
    quantize(small_model, tmp_path / "once", small("rtn"), layout="awq")
    with pytest.raises(ConfigError, match=r"is quantised already \(awq\)"):
        quantize(tmp_path / "once", tmp_path / "twice", small("rtn"))


def test_the_permutation_changes_weights_and_no_result(small_model: Path, tmp_path: Path) -> None:
    permute(small_model, tmp_path / "permuted", seed=1)
    before, after = Reference.load(small_model), Reference.load(tmp_path / "permuted")
    torch.testing.assert_close(after.logits(TEXT[:40]), before.logits(TEXT[:40]), rtol=1e-4, atol=1e-4)
    plain, permuted = open_checkpoint(small_model), open_checkpoint(tmp_path / "permuted")
    for name in ("model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        assert not torch.equal(plain.tensor(f"{name}.weight"), permuted.tensor(f"{name}.weight"))


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 7), (600, 600), (50, 1)])
def test_perplexity_is_that_of_the_oracle_window_by_window(small_model: Path, window: int, stride: int) -> None:
    text = TEXT[: 60 if stride == 1 else 100]
    window = min(window, 200)
    loaded = load(EngineConfig(model=str(small_model)))
    found = measure(loaded, text, window=window, stride=min(stride, window))
    oracle, losses = Reference.load(small_model), []
    for part in windows(len(text), window, min(stride, window)):
        logs = oracle.logits(text[part.begin : part.end]).log_softmax(-1)
        losses += [-float(logs[i - 1 - part.begin, text[i]]) for i in range(part.first, part.end)]
    assert found.scored == len(losses)
    assert found.nll == pytest.approx(sum(losses), rel=1e-5)
    if stride < window:
        assert found.scored == len(text) - 1, "every token but the first has something before it"


def test_agreement_judges_what_a_model_would_have_written_itself(small_model: Path) -> None:
    """Each token given those before it: a strange one costs itself and not what follows it."""
    reference = Reference.load(small_model)
    written = [*TEXT[:20], *reference.generate(TEXT[:20], 8, ignore_eos=True)]
    loaded = load(EngineConfig(model=str(small_model)))
    assert agreement(loaded, [(written, 20), (written, 24)]) == (8 + 4, 8 + 4)
    strange = [*written[:-1], (written[-1] + 1) % 256]
    assert agreement(loaded, [(strange, 20)]) == (7, 8)
