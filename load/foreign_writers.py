"""Quantised checkpoints by the packages that write them, for load.check_foreign. Runs in their environments.

    python foreign_writers.py PACKAGE MODEL OUT [CASE ...]

Writes OUT/CASE and then OUT/CASE.safetensors: the weights that the package itself makes of what it wrote, [N, K] by
name, in the type it computes in. A line of JSON for each case, with `error` where the package gave up. Rounding is to
the nearest everywhere, so that no text for calibration is needed.

A file of its own without imports of ours: those environments have no Signalbox.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

Case = Mapping[str, Any]

_DOWN = {"bits": 8, "group_size": 64, "sym": True}
_MIXED = {"layer_config": {"mlp.down_proj": _DOWN, "model.layers.0.self_attn.v_proj": {"bits": 16}}}


def _rounded(form: str, bits: int, group: int, sym: bool, **more: Any) -> Case:
    return {"form": form, "bits": bits, "group_size": group, "sym": sym, **more}


def _weights(bits: int, group: int | None, sym: bool = True) -> Case:
    strategy = "channel" if group is None else "group"
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": sym}


CASES: Mapping[str, Mapping[str, Case]] = {
    "auto-round": {
        "gptq-w4-g64": _rounded("auto_gptq", 4, 64, True),
        "gptq-w4-g32-zeros": _rounded("auto_gptq", 4, 32, False),
        "gptq-w4-channel": _rounded("auto_gptq", 4, -1, True),
        "gptq-w8-g64": _rounded("auto_gptq", 8, 64, True),
        "gptq-w2-g32-zeros": _rounded("auto_gptq", 2, 32, False),
        "gptq-mixed": _rounded("auto_gptq", 4, 64, True, **_MIXED),
        "awq-w4-g32-zeros": _rounded("auto_awq", 4, 32, False),
        "awq-w4-g64": _rounded("auto_awq", 4, 64, True),
        "compressed-w4-g64": _rounded("llm_compressor", 4, 64, True),
        "compressed-w4-g32-zeros": _rounded("llm_compressor", 4, 32, False),
        "compressed-w8-channel": _rounded("llm_compressor", 8, -1, True),
        "own-w4-g64": _rounded("auto_round", 4, 64, True),
        "own-w4-g32-zeros": _rounded("auto_round", 4, 32, False),
        "own-w2-g32-zeros": _rounded("auto_round", 2, 32, False),
        "own-gptqmodel-w4-g32-zeros": _rounded("auto_round:gptqmodel", 4, 32, False),
        "own-mixed": _rounded("auto_round", 4, 64, True, **_MIXED),
        "gguf-q4_0": {"form": "gguf:q4_0", "scheme": "GGUF:Q4_0"},
        "gguf-q4_1": {"form": "gguf:q4_1", "scheme": "GGUF:Q4_1"},
        "gguf-q8_0": {"form": "gguf:q8_0", "scheme": "GGUF:Q8_0"},
        "gguf-q4_k_m": {"form": "gguf:q4_k_m", "scheme": "GGUF:Q4_K_M"},
    },
    "llm-compressor": {
        "w4-g64": {"Linear": _weights(4, 64)},
        "w4-g32-zeros": {"Linear": _weights(4, 32, False)},
        "w4-channel": {"Linear": _weights(4, None)},
        "w8-g32-zeros": {"Linear": _weights(8, 32, False)},
        "w8-channel-zeros": {"Linear": _weights(8, None, False)},
        "w8-tensor": {"Linear": {**_weights(8, None), "strategy": "tensor"}},
        "mixed": {"re:.*self_attn.*": _weights(8, None), "re:.*mlp.*": _weights(4, 32, False)},
        "w4-g128-down": {"re:.*down_proj": _weights(4, 128)},  # W4A16 where 128 divides the inputs
        "w8a8": {"scheme": "W8A8"},
    },
    "gguf": {"Q4_0": {}, "Q4_1": {}, "Q8_0": {}},
}


def _loaded(folder: Path, **settings: Any) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


def _save(weights: Mapping[str, Any], dense: Path) -> None:
    """To a file that is there whole or not at all."""
    scratch = dense.with_suffix(".part")
    importlib.import_module("safetensors.torch").save_file(dict(weights), scratch)
    os.replace(scratch, dense)


def _matrices(model: Any) -> dict[str, Any]:
    """Weights of all linear layers and the embedding; a tied head is no matrix of its own."""
    nn = importlib.import_module("torch").nn
    return {
        f"{name}.weight": module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
        and not (name == "lm_head" and model.config.tie_word_embeddings)
    }


def auto_round(model: Path, out: Path, case: Case) -> dict[str, Any]:
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    settings = {key: value for key, value in case.items() if key != "form"}
    rounding = importlib.import_module("auto_round").AutoRound(
        _loaded(model, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(model),
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
        **settings,
    )
    scratch = out.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    rounding.quantize_and_save(str(scratch), format=case["form"])
    (written,) = scratch.iterdir()  # it names a folder of its own in the one it is given
    os.replace(written, out)
    scratch.rmdir()
    if case["form"].startswith("gguf"):
        return _from_gguf(next(out.glob("*.gguf")))
    if case["form"] == "llm_compressor":
        return _from_compressed(out)
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    if "awq" in stated.get("packing_format", stated["quant_method"]):
        return _from_awq(out, stated["bits"], stated["group_size"])
    settings = {"quantization_config": transformers.AutoRoundConfig(), "dtype": torch.float16, "device_map": "cpu"}
    served = _loaded(out, **settings)
    layers = {name: module for name, module in served.named_modules() if hasattr(module, "qweight")}
    layers = _packing_layers(out, stated) | layers
    return _matrices(served) | {f"{name}.weight": _multiplied_with(module) for name, module in layers.items()}


def _packing_layers(out: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """By module: layers of the class that packed the checkpoint, where they have its bits.

    auto-round itself serves no GPTQ with zeros on a CPU. They are made as it makes those that it serves: without g_idx.
    """
    stored = importlib.import_module("safetensors.torch").load_file(out / "model.safetensors")
    raw_zeros = stated.get("packing_format") in ("auto_round", "auto_round:gptqmodel")
    kind = importlib.import_module(f"auto_round_extension.torch.qlinear_torch{'' if raw_zeros else '_zp'}").QuantLinear
    layers = {}
    for module in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = {part: stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")}
        words, outputs = parts["qweight"].shape
        layer = kind(stated["bits"], stated["group_size"], words * 32 // stated["bits"], outputs, bias=False)
        if layer.scales.shape == parts["scales"].shape:
            layer.load_state_dict(parts)
            layers[module] = layer
    return layers


def _from_awq(out: Path, bits: int, group: int) -> dict[str, Any]:
    """With the function that its layers call: on a CPU it has none of them that would."""
    dequantised = importlib.import_module("auto_round.export.export_to_awq.utils").dequantize_gemm
    stored = importlib.import_module("safetensors.torch").load_file(out / "model.safetensors")
    weights = {}
    for module in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        weights[f"{module}.weight"] = dequantised(*parts, bits, group).T.contiguous()
    return weights


def _multiplied_with(layer: Any) -> Any:
    """The weight [N, K] of a layer that dequantises it on each call."""
    torch = importlib.import_module("torch")
    seen = []

    def matmul(x: Any, weight: Any) -> Any:
        seen.append(weight)
        return x @ weight

    inputs = getattr(layer, "in_features", None) or layer.infeatures
    with torch.no_grad(), mock.patch.object(torch, "matmul", matmul):
        layer(torch.zeros(1, inputs, dtype=torch.float16))
    (weight,) = seen
    return weight.T.contiguous()


def _from_compressed(out: Path) -> dict[str, Any]:
    """In the type of their scales: compressed-tensors multiplies in it, and widens what comes of that."""
    transformers = importlib.import_module("transformers")
    dense = transformers.CompressedTensorsConfig(run_compressed=False)
    weights = _matrices(_loaded(out, quantization_config=dense, dtype="float32"))
    stored = importlib.import_module("safetensors.torch").load_file(out / "model.safetensors")
    scales = {name.removesuffix("_scale"): scale for name, scale in stored.items() if name.endswith(".weight_scale")}
    return {name: weight.to(scales.get(name, weight).dtype) for name, weight in weights.items()}


def _from_gguf(file: Path) -> dict[str, Any]:
    """transformers reads blocks with `gguf`, and puts rows back in Hugging Face's order."""
    return _matrices(_loaded(file.parent, gguf_file=file.name, dtype="float32"))


def llm_compressor(model: Path, out: Path, case: Case) -> dict[str, Any]:
    transformers, quantization = (
        importlib.import_module(name) for name in ("transformers", "llmcompressor.modifiers.quantization")
    )
    groups = {name: {"targets": [name], "weights": weights} for name, weights in case.items()}
    what = {**case, "targets": "Linear"} if "scheme" in case else {"config_groups": groups}
    rounded = _loaded(model, dtype="float32")
    recipe = quantization.QuantizationModifier(**what, ignore=["lm_head"])
    importlib.import_module("llmcompressor").oneshot(model=rounded, recipe=recipe)
    rounded.save_pretrained(out, save_compressed=True)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return _from_compressed(out)


def requantised(model: Path, out: Path, case: Case) -> dict[str, Any]:
    """model: a .gguf file; its matrices in another type, everything else as it is."""
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(model)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "model.gguf"
    kind = gguf.GGMLQuantizationType[out.name]
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if numbers.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _from_gguf(file)


WRITERS: Mapping[str, Callable[[Path, Path, Case], dict[str, Any]]] = {
    "auto-round": auto_round,
    "llm-compressor": llm_compressor,
    "gguf": requantised,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=list(CASES))
    parser.add_argument("model", type=Path, help="folder in float32; for gguf a .gguf file")
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*")
    args = parser.parse_args()
    lines, sys.stdout = sys.stdout, sys.stderr  # they print as they like
    for name in args.cases or CASES[args.package]:
        out = args.out / name
        dense = args.out / f"{name}.safetensors"
        answer: dict[str, Any] = {"case": name}
        if not dense.exists():
            shutil.rmtree(out, ignore_errors=True)
            try:
                _save(WRITERS[args.package](args.model, out, CASES[args.package][name]), dense)
            except Exception as error:  # whatever they raise: the next case may do
                traceback.print_exc()
                answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=lines, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
