"""End-to-end training from a model on the disk to a packed one: planned, started, trained, written.

`full`: everything is trained, from the codes that another method chose (they lie in `.OUT.start` until the end), and
the unquantized model itself is the teacher. `scales`: the codes of a quantized model stay, packed, and its params are
trained; the second phase of EfficientQAT (Chen et al. 2024), and the repair of a model that somebody else quantized.
What is written is what was computed with in the last step, bit for bit. The state of an unfinished run lies in
`.OUT.training`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from whit.calibration import Calibration
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.reader import Checkpoint, read_json
from whit.checkpoint.work import is_done
from whit.coverage import Account, load_account
from whit.errors import RecipeError
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.job import Job, Options, open_source, prepare
from whit.methods.joined import Matrices, Part, grouped, join
from whit.methods.nested import moving_parts
from whit.methods.straight import Fitted, Straight
from whit.pipeline import run as write
from whit.plan import Coded, Item, Source
from whit.qat.course import Course
from whit.qat.inputs import Range
from whit.qat.loop import Loop
from whit.qat.network import Network
from whit.qat.ready import Ready
from whit.qat.sampled import own_calibration, sample_windows
from whit.qat.state import StateFile
from whit.qat.trained import Frozen, Kept, Trained, Value
from whit.recipe import Recipe
from whit.tensor import QuantizedTensor, matrix_shape, rotation
from whit.transcode import prepare_transcode, recast

OWN_TEXT = "self"  # in the place of a text: what the model itself writes


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
    """What surrounds a run: how it is done, the kind of file, and whom it follows.

    Full training starts from what the recipe's method makes of `calibration`, or from the folder `start` that whit has
    quantized in the same formats. Training scales follows `teacher`, an unquantized model, where there is one.
    """

    options: Options = field(default_factory=Options)
    export: str = "whit"
    calibration: Calibration | None = None
    start: Path | None = None
    teacher: str | Path | None = None


@dataclass(frozen=True)
class Training:
    """One end-to-end run, checked. `job` is what is written; `begin` makes what it starts from, where that must be."""

    mode: str
    job: Job
    course: Course
    words: Words
    setting: Setting
    begin: Job | None = None

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
    calibration = setting.calibration if recipe.needs_text else None
    job = prepare(model, out, recipe, setting.options, calibration, setting.export)
    if isinstance(job.source, Coded):
        raise RecipeError(f"{model}: quantized already; full training begins with the unquantized model; use scales")
    assert job.recipe is not None
    begin = None
    if not given:
        start = job.out.parent / f".{job.out.name}.start"
        static = job.recipe.activations if job.recipe.activations and job.recipe.activations.needs_stats else None
        first = Recipe(job.recipe.method, job.recipe.rules, activations=static, methods=job.recipe.methods)
        begin = prepare(model, start, first, setting.options, calibration)
    else:
        job = replace(job, calibration=None)  # ranges are those of the start
    told = {"start": _account_hash(setting.start) if setting.start is not None else None}
    job = replace(job, training={"mode": "full", **_described(course, words), **told})
    return Training("full", job, course, words, setting, begin)


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
    teacher = None if setting.teacher is None else str(setting.teacher)
    training = {"mode": "scales", **_described(course, words), "teacher": teacher}
    return Training("scales", replace(job, training=training, exact=frozenset()), course, words, setting)


def _refuse_activations(model: str, trusted: bool) -> None:
    folder = resolve_model(model, trusted)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if config.get("quantization_config", {}).get("inputs"):
        raise RecipeError(
            f"{model}: its inputs are quantized too; training scales alone knows weights only; "
            "train the unquantized model with --qat full and --activations"
        )


def train(
    training: Training, progress: Callable[[str, int, int, float], None] | None = None, save_every: float = 60.0
) -> Account:
    """Do a prepared run, or what a killed one left of it. `progress` gets what is done, steps, their total, loss."""
    job = training.job
    if not is_done(job.out, job.fingerprint, job.options.restart):
        return finish(training, learn(training, progress, save_every))
    return load_account(job.out)


def finish(training: Training, values: Mapping[str, Value]) -> Account:
    """Write what `learn` gave. Until that is done the state lies on the disk: a failure here costs no training."""
    job = training.job
    account = write(job, Ready(job.source, values, job.device))
    shutil.rmtree(training.place, ignore_errors=True)
    if training.begin is not None:
        shutil.rmtree(training.begin.out, ignore_errors=True)
    return account


def learn(
    training: Training, progress: Callable[[str, int, int, float], None] | None = None, save_every: float = 60.0
) -> dict[str, Value]:
    """The first part of `train`: the values of all parameters after the last step, on the CPU."""
    job, course = training.job, training.course
    state = StateFile(training.place / "state.safetensors", job.fingerprint, save_every, job.options.restart)
    codes = _codes(training)
    quantized = {item.name for item in job.plan.items if item.format is not None}
    own = training.mode == "full"
    network = Network(job.source, _reader(job.source), job.device, training.dtype, () if own else quantized)
    teacher = network.twin() if own and course.needs_teacher else None
    if training.setting.teacher is not None and course.needs_teacher:
        trusted = job.options.trust_remote_code
        exact = open_source(resolve_model(training.setting.teacher, trusted), trusted)
        teacher = Network(exact, _reader(exact), job.device, training.dtype)
    tokens = _tokens(training, teacher or network)
    ranges = _ranges(training)
    network.quantize_inputs(
        {
            i.target.holder: (i.activations, 0 if i.format is None else rotation(i.format))
            for i in job.plan.items if i.target is not None and i.activations
        },
        ranges,
    )  # fmt: skip
    with torch.no_grad():
        trained = prepare_trained(training, codes)
        trained |= {f"{holder}.inputs": one for holder, one in ranges.items()}
        if course.kept_rate > 0:
            trained |= _kept(job, network)
    loop = Loop(network, teacher, trained, tokens, course)
    loop.run(state, None if progress is None else lambda *step: progress("training", *step))
    with torch.no_grad():
        return {name: value.to("cpu") for one in trained.values() for name, value in one.values().items()}


def prepare_trained(training: Training, codes: Callable[[Item], QuantizedTensor]) -> dict[str, Trained]:
    """Every quantized parameter, made ready from its start; joined where that computes the same."""
    job, course, plain = training.job, training.course, training.course.units == "plain"
    trained: dict[str, Trained] = {}
    for items in _joined(job):
        starts = [codes(item).to(job.device) for item in items]
        parts = [Part(i.name, s.shape[0], i.matrix, i.parameter) for i, s in zip(items, starts, strict=True)]
        if training.mode == "scales":
            moving = moving_parts(lambda _, start: Frozen(start, plain), None, join(starts))
        else:
            weight = torch.cat([item.matrix(job.source.read(item.name).to(job.device)) for item in items])
            make = Fitted if course.fitted else lambda own, start: Straight(own, start, course.inside, plain)
            moving = moving_parts(make, weight, join(starts))
        trained[items[0].name] = Matrices(parts, moving)
    return trained


def _joined(job: Job) -> list[list[Item]]:
    """Items that are trained as one."""
    items = {item.name: item for item in job.plan.items if item.target is not None}
    shapes = []
    for name, item in items.items():
        if item.format is not None and item.target is not None:
            columns = item.target.shape[-1]
            shapes.append((name, item.format, (prod(item.spec.shape) // columns, columns)))
    return [[items[name] for name in names] for names in grouped(shapes, job.device)]


def _codes(training: Training) -> Callable[[Item], QuantizedTensor]:
    """Where the codes are that training begins with."""
    job = training.job
    source: Source = job.source
    if training.mode == "full":
        if training.begin is not None:
            own = training.words.text == OWN_TEXT and training.begin.calibration is not None
            begin = replace(training.begin, calibration=own_calibration(training.begin)) if own else training.begin
            write(begin)
        source = open_source(_start(training))
    assert isinstance(source, Coded)

    def read(item: Item) -> QuantizedTensor:
        assert isinstance(source, Coded)
        assert item.format is not None
        found = recast(source.quantized(item.name), item.format, item.name)
        return QuantizedTensor(found.format, matrix_shape(found.shape), found.codes, found.params)

    return read


def _start(training: Training) -> Path:
    """The folder that full training begins with."""
    folder = training.begin.out if training.begin is not None else training.setting.start
    assert folder is not None
    return folder


def _ranges(training: Training) -> dict[str, Range]:
    """The static ranges of inputs, as the start has them."""
    job, found = training.job, dict[str, Range]()
    static = [i for i in job.plan.items if i.target is not None and i.activations and i.activations.needs_stats]
    if not static:
        return found
    with Checkpoint(_start(training)) as stored:
        for item in static:
            assert item.target is not None
            assert item.activations is not None
            holder = item.target.holder
            if missing := [key for key in item.activations.specs if f"{holder}.{key}" not in stored]:
                raise RecipeError(
                    f"{holder}: the start has no {missing[0]}; activations {item.activations} must begin with a "
                    "calibrated range; quantize the start with them, or name a method as --start"
                )
            values = {key: stored[f"{holder}.{key}"] for key in item.activations.specs}
            found[holder] = Range(holder, item.activations, values, job.device)
    return found


def _tokens(training: Training, writer: Network) -> Tensor:
    """int64 (windows, context)."""
    words, job = training.words, training.job
    if words.tokens is not None:
        return words.tokens
    most = maximum_context(job.source.model.config)
    if words.text == OWN_TEXT:
        return sample_windows(writer, words.windows, words.context or min(512, most or 512), training.course.seed)
    tokenizer = load_tokenizer(str(job.source.checkpoint.folder), trust_remote_code=job.options.trust_remote_code)
    text = Calibration(words.text, words.windows, words.context or min(512, most or 512), training.course.seed)
    return text.tokens(tokenizer, most).tokens


def _reader(source: Source) -> Callable[[str], Tensor]:
    return source.read


def _kept(job: Job, network: Network) -> dict[str, Trained]:
    """What is not quantized: norms, biases, embeddings."""
    parameters = dict(network.model.named_parameters())
    items = [item for item in job.plan.items if item.format is None and item.name in parameters]
    return {i.name: Kept(i.name, job.source.read(i.name).to(job.device), i.spec.dtype) for i in items}


def _described(course: Course, words: Words) -> dict[str, object]:
    """What a run depends on beside the model and the plan."""
    text: dict[str, object] = {"text": str(words.text), "windows": words.windows, "context": words.context}
    if words.tokens is not None:
        digest = sha256(words.tokens.contiguous().numpy().tobytes()).hexdigest()
        text = {"sha256": digest, "windows": len(words.tokens), "context": words.tokens.shape[1]}
    return {"course": course.to_json(), "words": text}


def _account_hash(folder: Path) -> str:
    return sha256((folder / "whit.json").read_bytes()).hexdigest()
