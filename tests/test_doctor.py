"""The doctor: quick, never the patient, and a fixing command after every failure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import palign
from kit import doctor, doctor_full
from tests.conftest import ROOT

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


def test_a_check_sees_packages_that_only_pythonpath_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._run_alone("Python")[0]
    assert (tmp_path / "seen").exists()


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
    monkeypatch.setattr(doctor, "CHECKS", {"thing": (lambda: (False, "broken"), "fix it")})
    assert palign.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL  thing" in shown and "-> fix it" in shown and "Fix the FAIL items" in shown
    # for programs, with what is known so far for people
    assert palign.main(["doctor", "--json"]) == 1
    shown, said = capsys.readouterr()
    assert json.loads(shown)["checks"][0]["found"] == "broken"
    assert "FAIL  thing" in said


def test_each_check_is_told_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(doctor, "CHECKS", {"one": (lambda: (True, "there"), "")})
    quick = {"two": (lambda: (told == ["one"], "after one was told"), "tell at once")}
    monkeypatch.setattr(doctor, "FULL_CHECKS", quick)
    result = doctor.examine(True, lambda check: told.append(check["name"]))
    assert result["ok"] and told == ["one", "two"]


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


FULL_NAMES = ["cache", "generation", "out of memory", "training peak", "memory returned"]


@pytest.mark.slow
def test_all_full_checks_pass_on_this_machine() -> None:
    command = [sys.executable, "palign.py", "doctor", "--full", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    checks = {check["name"]: check for check in result["checks"]}
    assert list(checks)[-len(FULL_NAMES) :] == FULL_NAMES and set(checks) > NAMES
    for name in FULL_NAMES:
        assert checks[name]["ok"], checks[name]
        assert checks[name].keys() == {"name", "ok", "found", "fix"}


def test_full_checks_run_one_after_the_other_and_after_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(doctor, "_examine", lambda name: ran.append(name) or {"ok": True})
    doctor.examine(full=True)
    assert ran[-len(FULL_NAMES) :] == FULL_NAMES and len(ran) == len(NAMES) + len(FULL_NAMES)
    ran.clear()
    doctor.examine()
    assert not set(FULL_NAMES) & set(ran)


def test_a_cache_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter(([[0.1, 0.2]], [[0.1, 0.2]], [[0.1, 0.2]], [[0.1, 0.9]]))
    monkeypatch.setattr(doctor_full, "_open", lambda *_: closing(FakeBackend(scores)))
    ok, found = doctor_full.cache()
    assert not ok and "nf4 (none) 0.700" in found


class FakeBackend:
    """Nothing to compute with, where the numbers are given."""

    cache_kind = "none"
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=100))

    def __init__(self, scores: Iterator[Any]) -> None:
        self.scores = scores

    def session(self, uncached: bool = False) -> FakeBackend:
        return self

    def score(self, requests: Any) -> Any:
        return next(self.scores)

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_an_out_of_memory_that_is_not_recovered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.backends import hf_generate

    monkeypatch.setattr(doctor, "ALONE", set())
    check = doctor._examine("out of memory")
    assert check["ok"], check
    assert "6 of 6 answers as before; " in check["found"]

    def give_up(scheduler: Any) -> None:
        raise RuntimeError("not recovered")

    monkeypatch.setattr(hf_generate.Scheduler, "_shrink", give_up)
    check = doctor._examine("out of memory")
    assert check["ok"] is False and "not recovered" in check["found"] and check["fix"]


@pytest.mark.slow
def test_a_model_that_stays_in_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.training import trainer

    monkeypatch.setattr(doctor, "ALONE", set())
    check = doctor._examine("memory returned")
    assert check["ok"] and "after each of two" in check["found"]
    kept: list[Any] = []
    real = trainer.make_model
    monkeypatch.setattr(trainer, "make_model", lambda config: kept.append(real(config)) or kept[0])
    check = doctor._examine("memory returned")
    assert check["ok"] is False, check


# --- the driver, through a real program named nvidia-smi ---


def nvidia_smi(folder: Path, output: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    program.chmod(0o755)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on the path, for a nvidia-smi; no card is hidden from torch."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


@pytest.mark.parametrize(
    ("wheel", "driver_version", "said"),
    [
        (None, "580.65", "is built for CPUs alone"),
        ("13.0", "535.183.01", "is built for CUDA 13.0, which needs 580"),
        ("12.6", "470.2", "which needs 525"),
        ("13.0", "580.65", "which sees no device"),
    ],
)
def test_a_card_that_torch_does_not_see_is_an_error(
    wheel: str | None,
    driver_version: str,
    said: str,
    driver: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from kit.core.card import check_card
    from kit.core.errors import KitError

    nvidia_smi(driver, f"{driver_version}, NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.version, "cuda", wheel)
    with pytest.raises(KitError, match=said) as caught:
        check_card()
    for part in (driver_version, "RTX 4090", torch.__version__, "export CUDA_VISIBLE_DEVICES="):
        assert part in str(caught.value)
    if "built" in said or "on" in said:
        assert "pip install --force-reinstall torch==" in caught.value.hint or wheel == "13.0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_card() == ""


@pytest.mark.parametrize(("output", "code"), [("No devices were found", 6), ("", 0)])
def test_a_driver_without_a_card_is_no_error(output: str, code: int, driver: Path) -> None:
    from kit.core.card import check_card

    nvidia_smi(driver, output, code)
    assert check_card() == ""


def test_a_driver_that_does_not_answer_is_an_error(driver: Path) -> None:
    from kit.core.card import check_card
    from kit.core.errors import KitError

    nvidia_smi(driver, "NVIDIA-SMI has failed because it could not reach the driver.", 9)
    with pytest.raises(KitError, match="nvidia-smi fails: NVIDIA-SMI has failed"):
        check_card()


def test_a_run_stops_where_torch_does_not_see_the_card(driver: Path, tmp_path: Path) -> None:
    nvidia_smi(driver, "535.183.01, NVIDIA GeForce RTX 4090")
    command = [sys.executable, "palign.py", "run", "configs/smoke.yaml", f"out={tmp_path / 'r'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "driver 535.183.01" in done.stderr
    assert not (tmp_path / "r" / "traces.jsonl").exists()
    found = doctor._examine("CUDA")
    assert found["ok"] is False and "535.183.01" in found["found"] and "cu126" in found["fix"]


# --- the card, by what torch says of it ---


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch's answers on a machine with a T4; nothing is computed there."""
    import torch

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_100"])
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (14 << 30, 15 << 30))
    monkeypatch.setattr(cuda, "set_device", lambda number: None)
    return monkeypatch


def test_a_card_is_named_with_its_capability_and_free_memory(card: pytest.MonkeyPatch) -> None:
    import torch

    from kit.core.card import check_card

    said = check_card()
    assert said.startswith("Tesla T4, compute capability 7.5") and "14.0 of 15.0 GiB free" in said
    ranks: list[int] = []
    card.setattr(torch.cuda, "set_device", ranks.append)
    card.setenv("LOCAL_RANK", "1")
    check_card()
    assert ranks == [1]


def test_a_card_older_than_torchs_kernels_is_refused(card: pytest.MonkeyPatch) -> None:
    import torch

    from kit.core.card import check_card
    from kit.core.errors import KitError

    card.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(KitError, match=r"compute capability 6\.1; .* kernels from 7\.5 on"):
        check_card()


def test_a_card_without_bf16_computes_in_fp16(card: pytest.MonkeyPatch) -> None:
    import torch

    from kit.core.card import half_dtype
    from kit.core.errors import KitError

    assert half_dtype() == torch.float16
    with pytest.raises(KitError, match="Tesla T4 only emulates bf16"):
        half_dtype("bf16")
    card.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert half_dtype() == half_dtype("bf16") == torch.bfloat16


def test_the_command_for_llama_cpp_does_not_take_the_cached_wheel() -> None:
    """pip keys its cache by the source alone: CMAKE_ARGS would change nothing."""
    _, fix = doctor.CHECKS["llama.cpp"]
    for part in ("CMAKE_ARGS=", "-DGGML_CUDA=on", "--no-cache-dir", "--force-reinstall"):
        assert part in fix
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fix.split("pip install ")[1] in readme
