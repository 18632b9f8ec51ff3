"""The doctor: quick, never the patient, and a fixing command after every failure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit import doctor

NAMES = {
    "Python",
    "packages",
    "C++ compiler",
    "CUDA",
    "gradient",
    "llama.cpp",
    "memory",
    "disk",
    "model hub",
}


@pytest.fixture(scope="module")
def examined() -> dict[str, Any]:
    """Everything but the gradients, which take most of a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(doctor.CHECKS, "gradient")
        return doctor.examine()


def test_everything_is_examined(examined: dict[str, Any]) -> None:
    found = {check["name"]: check for check in examined["checks"]}
    assert set(found) == NAMES - {"gradient"}
    assert set(doctor.CHECKS) == NAMES
    for check in found.values():
        assert check["found"] and (check["ok"] or check["fix"])
    for name in ("Python", "llama.cpp"):
        assert found[name]["ok"], found[name]
    hub = found["model hub"]
    assert hub["ok"] is None and "HF_HUB_OFFLINE" in hub["found"]


@pytest.mark.slow
def test_the_gradients_of_the_packaged_model_are_sound_in_every_dtype() -> None:
    """The default suite trains it in NF4 (tests/test_pipeline.py), which makes the same check."""
    check = doctor._examine("gradient")
    assert check["ok"], check
    for dtype in ("fp32", "int8", "nf4"):
        assert re.search(rf"{dtype} off by 0\.\d%, loss \d", check["found"])


def test_result_is_json_and_shown(
    examined: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(json.dumps(examined)) == examined
    doctor.show(examined)
    shown = capsys.readouterr().out
    assert all(check["name"] in shown for check in examined["checks"])
    monkeypatch.setattr(doctor, "CHECKS", {"thing": (lambda: (False, "broken"), "fix it")})
    result = doctor.examine()
    assert result["ok"] is False
    doctor.show(result)
    shown = capsys.readouterr().out
    assert "FAIL  thing" in shown and "-> fix it" in shown and "Fix the FAIL items" in shown


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.CHECKS, "memory", (lambda: 1 / 0, "fix it"))  # type: ignore[arg-type, return-value]
    check = doctor._examine("memory")
    assert (
        check["ok"] is False and "ZeroDivisionError" in check["found"] and check["fix"] == "fix it"
    )


def test_a_gradient_that_is_not_the_slope_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.training import trainer

    real = trainer.make_model

    def severed(config: Any) -> Any:
        model = real(config)
        for layer in model.get_base_model().model.layers[:3]:
            layer.mlp.register_forward_hook(lambda _module, _inputs, output: output.detach())
        return model

    monkeypatch.setattr(trainer, "make_model", severed)
    monkeypatch.setattr(doctor, "ALONE", set())
    check = doctor._examine("gradient")
    assert check["ok"] is False and "get none" in check["found"] and "peft" in check["fix"]


def test_a_forward_pass_that_is_far_off_in_one_dtype_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {"fp32": 2.0, "int8": 2.1, "nf4": 7.0, "bf16": 2.0}
    monkeypatch.setattr(doctor, "_check_gradient", lambda dtype: (losses[dtype], 0.0))
    monkeypatch.setattr(doctor, "ALONE", set())
    check = doctor._examine("gradient")
    assert check["ok"] is False and "nf4 off by 0.0%, loss 7.00" in check["found"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.abort()", "died with code -6"),
        ("import nothing_of_that_name", "No module named"),
        ("import time; time.sleep(60)", "timed out after 2 seconds"),
        ("print('what?')", "JSONDecodeError"),
    ],
)
def test_a_library_that_kills_or_hangs_its_process_is_a_finding(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: real([sys.executable, "-c", code], **more)
    )
    monkeypatch.setattr(doctor, "ALONE_SECONDS", 2)
    check = doctor._examine("llama.cpp")
    assert check["ok"] is False and said in check["found"] and check["fix"]


def test_versions_that_drifted_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text(
        "# pins\npytest==0.1\nno-such-package==2.0\npydantic>=1\n"
    )
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    check = doctor._examine("packages")
    assert check["ok"] is False and check["fix"] == "python -m pip install -r requirements.txt"
    for said in ("(pinned 0.1)", "no-such-package missing (pinned 2.0)"):
        assert said in check["found"]
    assert "pydantic" not in check["found"]


def test_a_packaged_model_that_was_damaged_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kit import models

    copy = tmp_path / "cut.gguf"
    copy.write_bytes(models.gguf_file("smollm2-135m").read_bytes()[:1_000_000])
    monkeypatch.setattr(models, "gguf_file", lambda name: copy)
    monkeypatch.setattr(doctor, "ALONE", set())
    check = doctor._examine("llama.cpp")
    assert (
        check["ok"] is False
        and "ValueError" in check["found"]
        and "--force-reinstall" in check["fix"]
    )


def test_a_hub_that_does_not_answer_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for address in ("http://127.0.0.1:9", "not an address"):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        ok, found = doctor._hub()
        assert ok is None and address in found
