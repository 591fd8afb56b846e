"""`signalbox quantize` and `signalbox eval perplexity` as a person types them: what appears, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.progress import Progress

from deploy import cli
from tests.small_model import write_small_model

TEXT = "The harbour of Lindesnes was built in 1843, after three ships were lost on the rocks. " * 12
FEW = ("--group-size", "32", "--samples", "4", "--window", "64")


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str


Signalbox = Callable[..., Run]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def signalbox(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Signalbox:
    """The command in a folder that holds `model`, a link to the small model, and text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("model").symlink_to(small)
    Path("text.txt").write_text(TEXT)

    def run(*arguments: str) -> Run:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["signalbox", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Run(int(ended.value.code or 0), printed.out, printed.err)

    return run


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
def test_a_model_is_quantised_and_its_perplexity_measured(signalbox: Signalbox, method: str) -> None:
    calibration = () if method == "rtn" else ("--calibration", "text.txt")
    made = signalbox("quantize", "./model", "--method", method, "--out", "out", *calibration, *FEW)
    assert made.status == 0, made.err
    assert "smaller than in 16 bits" in made.out
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out", "text.txt"]
    stated = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == {"awq": "awq", "gptq": "gptq", "rtn": "compressed-tensors"}[method]
    assert ("--layout compressed-tensors keeps these zeros" in made.err) == (method == "gptq")
    if method == "gptq":
        for arguments, said in ((("--act-order", "desc"), True), (("--bits", "2"), False), (("--symmetric",), False)):
            other = signalbox(
                "quantize", "./model", "--method", method, "--out", "other", *calibration, *FEW, *arguments
            )
            assert ("vLLM (0.32) reads the gptq layout only with --symmetric" in other.err) == said
            assert "compressed-tensors" not in other.err, "it holds neither"
            shutil.rmtree("other")
    modes = {path.stat().st_mode & 0o777 for path in Path("out").glob("*.[js]*")}
    assert len(modes) == 1, "who may read the configuration may read the weights"

    options = ("--text", "text.txt", "--window", "64", "--json")
    figures = [json.loads(signalbox("eval", "perplexity", model, *options).out) for model in ("./model", "./out")]
    full, few = (one["perplexity"] for one in figures)
    assert few != full
    assert few == pytest.approx(full, rel=0.5)
    assert figures[0]["scored"] == figures[1]["scored"] > 0


def test_perplexity_states_its_method(signalbox: Signalbox) -> None:
    told = signalbox("eval", "perplexity", "./model", "--text", "text.txt", "--window", "64", "--stride", "32")
    assert told.status == 0
    assert "method: windows of 64 tokens every 32, each token scored once" in told.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "best"), "method 'best' is not known; use rtn, awq, gptq"),
        (("--method", "awq", "--bits", "8"), "method 'awq' makes 4 bits, not 8"),
        (("--method", "rtn", "--bits", "3"), "method 'rtn' makes 2, 4, 8 bits, not 3"),
        (("--method", "gptq", "--group-size", "40", "--calibration", "text.txt"), "not a multiple of group size 40"),
        (("--method", "gptq"), "method 'gptq' needs a calibration text"),
        (("--method", "awq", "--calibration", "nowhere.txt"), "--calibration 'nowhere.txt' cannot be read"),
        (("--method", "awq", "--calibration", "model/model.safetensors"), "cannot be read: 'utf-8' codec"),
        (("--method", "gptq", "--calibration", "short.txt"), "has 5 tokens, fewer than a window of 512"),
        (("--method", "rtn", "--layout", "gguf"), "layout 'gguf' is not known"),
        (("--method", "rtn", "--bits", "8", "--layout", "awq"), "awq"),
    ],
)
def test_what_cannot_be_quantised_is_one_line_on_stderr_and_leaves_nothing(
    signalbox: Signalbox, arguments: tuple[str, ...], said: str
) -> None:
    Path("short.txt").write_text("short")
    before = sorted(Path().iterdir())
    refused = signalbox("quantize", "./model", "--out", "out", "--group-size", "32", *arguments)
    assert (refused.status, refused.out) == (1, "")
    line = refused.err.strip().splitlines()[-1]
    assert line.startswith("signalbox: ")
    assert said in line
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("model", ["./nowhere", "text.txt", "smolm2-135m-instruct"])
def test_a_model_that_is_none_is_named(signalbox: Signalbox, model: str) -> None:
    for command in (("quantize", "--method", "rtn", "--out", "out"), ("eval", "perplexity", "--text", "text.txt")):
        refused = signalbox(*command, model)
        assert (refused.status, refused.out) == (1, "")
        assert repr(model) in refused.err
    assert not Path("out").exists()


def test_nothing_of_anybody_elses_is_overwritten(signalbox: Signalbox) -> None:
    for taken in ("out", "out.parts"):
        Path(taken).mkdir()
        (Path(taken) / "notes.txt").write_text("mine")
        refused = signalbox("quantize", "./model", "--method", "rtn", "--out", "out", *FEW)
        assert refused.status == 1
        assert repr(taken) in refused.err
        assert (Path(taken) / "notes.txt").read_text() == "mine"
        shutil.rmtree(taken)
    Path("out").write_text("a file")
    assert "'out' is not a folder" in signalbox("quantize", "./model", "--method", "rtn", "--out", "out", *FEW).err


def test_a_run_that_was_interrupted_goes_on(signalbox: Signalbox, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", "./model", "--method", "gptq", "--calibration", "text.txt", *FEW, "--out")
    assert signalbox(*command, "whole").status == 0

    update = Progress.update

    def interrupt(self: Progress, *args: object, **values: object) -> None:
        update(self, *args, **values)  # type: ignore[arg-type]
        if values["completed"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt)
        cut = signalbox(*command, "cut")
    assert cut.status == 130
    assert "the same command goes on with the first layer that is missing" in cut.err
    assert not Path("cut").exists()

    again = signalbox(*command, "cut")
    assert again.out.rstrip().endswith("1 layers were there from an earlier run")
    assert Path("cut/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "nowhere.txt"), "--text 'nowhere.txt' cannot be read"),
        (("--text", "empty.txt"), "a text of 0 tokens holds nothing to predict"),
        (("--text", "text.txt", "--window", "1"), "window must be at least 2 tokens, got 1"),
        (("--text", "text.txt", "--window", "9999"), "window 9999 is longer than the model's 256 tokens"),
        (("--text", "text.txt", "--window", "64", "--stride", "65"), "stride must be between 1 and the window"),
        (("--text", "text.txt", "--quantization", "int5"), "'int5'"),
        (("--text", "text.txt", "--kv-cache-dtype", "int5"), "'int5'"),
    ],
)
def test_what_has_no_perplexity_is_one_line_on_stderr(
    signalbox: Signalbox, arguments: tuple[str, ...], said: str
) -> None:
    Path("empty.txt").write_text("")
    refused = signalbox("eval", "perplexity", "./model", *arguments)
    assert (refused.status, refused.out) == (1, "")
    line = refused.err.strip().splitlines()[-1]
    assert line.startswith("signalbox: ")
    assert said in line
