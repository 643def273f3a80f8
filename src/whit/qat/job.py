"""End-to-end training before it begins: planned and checked, no weight read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from whit.calibration import Calibration
from whit.capabilities import learned
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.reader import read_json
from whit.checkpoint.work import recorded_fingerprint
from whit.errors import RecipeError, UnsupportedModelError
from whit.formats.bands import bands_of
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.pipeline.job import Job, Options, open_source, prepare
from whit.pipeline.plan import Item
from whit.pipeline.sources import Coded, Source
from whit.pipeline.transcode import prepare_transcode, rules_for
from whit.qat.course import Course
from whit.recipe import Recipe
from whit.tensor import Format

OWN_TEXT = "self"  # in the place of a text: what the model itself writes
CONTEXT = 512  # tokens a window, unless the model was built for fewer


@dataclass(frozen=True)
class Words:
    """The windows to train on: drawn from a text file or `whit:text`, or (`self`) written by the teacher.

    `tokens` int64 (windows, context) take the place of all that.
    """

    text: str | Path = "whit:text"
    windows: int = 1024
    context: int | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Setting:
    """What a training run needs besides its hyper-parameters: options, kind of file, start and teacher.

    Full training starts from what the recipe's method makes of `calibration`, or from the folder `start`, which whit
    has quantized to the same formats. Training of scales follows `teacher`, an unquantized model, if there is one.
    """

    options: Options = field(default_factory=Options)
    export: str = "whit"
    calibration: Calibration | None = None
    start: Path | None = None
    teacher: str | Path | None = None


@dataclass(frozen=True)
class Training:
    """One end-to-end run, checked. `job` is what is written; `begin` makes what it starts from, where that must be.

    `exact` has the weights that errors are measured from, where these are not MODEL's. `tokens` int64 (windows,
    context) are there unless the model is to write them.
    """

    mode: str
    job: Job
    course: Course
    words: Words
    setting: Setting
    begin: Job | None = None
    exact: Source | None = None
    tokens: Tensor | None = None

    @property
    def context(self) -> int:
        """Tokens a window."""
        return self.tokens.shape[1] if self.tokens is not None else _context(self.job, self.words)

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which the model computes; masters are float32."""
        return torch.bfloat16 if self.job.device.type == "cuda" else torch.float32

    @property
    def place(self) -> Path:
        """Where the state lies."""
        return self.job.out.parent / f".{self.job.out.name}.training"


def prepare_full(
    model: str | Path, out: str | Path, recipe: Recipe, course: Course, words: Words | None = None,
    setting: Setting | None = None,
) -> Training:  # fmt: skip
    """Plan the training of all of a model; the `recipe` says the formats and the method that chooses the start."""
    setting, words = setting or Setting(), words or Words()
    given = setting.start is not None
    if given:
        recipe = recipe.changed(method="rtn", methods=(), transform=None)
    if recipe.transform is not None:
        raise RecipeError(
            f"start {recipe.transform.name}: it rescales the weights, and training begins with the model's own; the "
            "start must leave them as they are; use clip or gptq"
        )
    calibration = setting.calibration if recipe.needs_text else None
    job = prepare(model, out, recipe, setting.options, calibration, setting.export)
    if isinstance(job.source, Coded):
        raise RecipeError(f"{model}: quantized already; full training begins with the unquantized model; use scales")
    assert job.recipe is not None
    _check_models(job, course, setting)
    tokens, begin = draw(job, words, course.seed), None
    if not given:
        start = job.out.parent / f".{job.out.name}.start"
        begin = prepare(model, start, _as_planned(job, job.recipe), setting.options, calibration)
    else:
        job = replace(job, calibration=None)  # ranges are those of the start
    told = {"start": _account_hash(setting.start) if setting.start is not None else None}
    job = replace(job, training={"mode": "full", **_described(course, words, tokens), **told})
    return Training("full", job, course, words, setting, begin, tokens=tokens)


def _as_planned(job: Job, recipe: Recipe) -> Recipe:
    """The recipe with a rule for every format that is in the plan: those that a mix or a kind of file has led to."""
    targets = {item.target: item.format for item in job.plan.items if item.target is not None}
    return recipe.with_rules(rules_for(list(targets), {t: f for t, f in targets.items() if f is not None}))


def prepare_scales(
    model: str | Path, out: str | Path, course: Course, words: Words | None = None, setting: Setting | None = None
) -> Training:
    """Plan the training of a quantized model's params. Without a teacher it learns from the text alone."""
    setting, words = setting or Setting(), words or Words()
    if setting.teacher is None and course.needs_teacher:
        course = replace(course, distill=0.0, hidden=0.0, text=course.text or 1.0)
    if setting.teacher is None and words.text == OWN_TEXT:
        raise RecipeError("train: text self without a teacher; the model's own errors teach nothing; name --teacher")
    _refuse_activations(str(model), setting.options.trust_remote_code)
    job = prepare_transcode(model, out, setting.export, setting.options)
    training = plan_scales(job, course, words, setting)
    return replace(training, job=replace(job, training=told_of_scales(training), exact=frozenset()))


def plan_scales(job: Job, course: Course, words: Words, setting: Setting) -> Training:
    """Training of the params of what `job` writes, or has written: all that can be checked before that is there."""
    require_params(job.plan.items, course)
    _check_models(job, course, setting)
    return Training("scales", job, course, words, setting, tokens=draw(job, words, course.seed))


def told_of_scales(training: Training) -> dict[str, object]:
    """What the account says of such a run."""
    setting = training.setting
    teacher = None if setting.teacher is None else str(setting.teacher)
    return {"mode": "scales", **_described(training.course, training.words, training.tokens), "teacher": teacher}


def draw(job: Job, words: Words, seed: int) -> Tensor | None:
    """The windows, int64 (windows, context), or None where the model is to write them; CalibrationError where the text
    is missing or too short."""
    if words.tokens is not None or words.text == OWN_TEXT:
        return words.tokens
    tokenizer = load_tokenizer(str(job.source.checkpoint.folder), trust_remote_code=job.options.trust_remote_code)
    most = maximum_context(job.source.model.config)
    return Calibration(words.text, words.windows, _context(job, words), seed).tokens(tokenizer, most).tokens


def _context(job: Job, words: Words) -> int:
    return words.context or min(CONTEXT, maximum_context(job.source.model.config) or CONTEXT)


def _check_models(job: Job, course: Course, setting: Setting) -> None:
    """Raise where the model is none that reads one text, or a teacher says other things than it does."""
    model = job.source.model
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__}: reads one text and writes another; training end to end knows models of one text; "
            "quantize it without training"
        )
    if setting.teacher is None or not course.needs_teacher:
        return
    trusted = job.options.trust_remote_code
    source = open_source(resolve_model(setting.teacher, trusted), trusted)
    source.checkpoint.close()
    keys = ("vocab_size", *(("num_hidden_layers", "hidden_size") if course.hidden else ()))
    for key in keys:
        own, other = (getattr(m.config.get_text_config(), key, None) for m in (model, source.model))
        if own != other:
            raise RecipeError(
                f"teacher {setting.teacher}: its {key} is {other}, MODEL's {own}; they must be equal; "
                "name the model that MODEL was made from"
            )


def require_params(items: Sequence[Item], course: Course) -> None:
    """RecipeError where training scales would move nothing."""
    formats = {str(item.format): item.format for item in items if item.format is not None}
    if not course.kept_rate and not any(learned(part) for f in formats.values() for part in _around(f)):
        raise RecipeError(
            f"train: no gradient can move the scales of {', '.join(formats)}; some format must have scales that can be "
            "trained; use --qat full, or another format"
        )


def _around(format: Format) -> list[Format]:
    """The formats in one of bands, or itself."""
    found = bands_of(format)
    return [format] if found is None else [part for part, _ in found.parts]


def _refuse_activations(model: str, trusted: bool) -> None:
    folder = resolve_model(model, trusted)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if config.get("quantization_config", {}).get("inputs"):
        raise RecipeError(
            f"{model}: its inputs are quantized too; training scales alone knows weights only; "
            "train the unquantized model with --qat full and --activations"
        )


def _described(course: Course, words: Words, tokens: Tensor | None) -> dict[str, object]:
    """What a run depends on beside the model and the plan."""
    text: dict[str, object] = {"text": str(words.text), "windows": words.windows, "context": words.context}
    if tokens is not None:
        digest = sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
        named = {} if words.tokens is not None else {"text": str(words.text)}
        text = {**named, "sha256": digest, "windows": len(tokens), "context": tokens.shape[1]}
    return {"course": course.to_json(), "words": text}


def _account_hash(folder: Path) -> str:
    if recorded_fingerprint(folder) is None:
        raise RecipeError(
            f"start {folder}: holds no model that whit has quantized; it must; quantize one to the same formats, or "
            "name a method"
        )
    return sha256((folder / "whit.json").read_bytes()).hexdigest()
