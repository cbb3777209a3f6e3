"""Doing a job: train a pair's models, decide its maps, or train a student."""

from __future__ import annotations

import io
import tempfile
import time
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llm_distill import DistillTrainer, HiddenStates, LayerMap, Local, Logits, schedules
from llm_distill.layers import Row, auto, auto_race
from llm_distill.losses import forward_kl
from llm_distill.preparation import prepare_run
from llm_distill.students import load_student
from llm_distill.surveying import survey
from scripts.bench.mapping import models
from scripts.bench.mapping.arms import decided
from scripts.bench.mapping.texts import Texts, collate

if TYPE_CHECKING:
    from llm_distill.objectives import Objective
    from scripts.bench.mapping.jobs import Job, Line, Rows
    from scripts.bench.mapping.settings import Pair, Settings

WARMUP_STEPS = 0.1

SHORTEST = 5
"""Steps of a race's shortest training: one of the usual length would not fit into 200."""


def do(job: Job, settings: Settings, text: str | None, work: str) -> Line:
    """A job from its settings to its line, on one core.

    Args:
        job: What to do.
        settings: Of the benchmark.
        text: File of the text; None: that of the quickstart.
        work: Folder of the results, and of the models.
    """
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    with redirect_stdout(io.StringIO()):
        bench = Bench.of(job.pair, settings, text, work)
        found = {"models": bench.models, "maps": bench.maps, "run": bench.run}[job.kind](job)
    seconds = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu": round(time.process_time() - cpu, 2),
    }
    return found | seconds


class Bench:
    """One pair, ready to work.

    Args:
        pair: Its models.
        settings: Of the benchmark.
        texts: Training and held out.
        folder: Of the pair's models.
    """

    def __init__(self, pair: Pair, settings: Settings, texts: Texts, folder: Path) -> None:
        self.pair, self.settings, self.folder = pair, settings, folder
        self.train = texts.training(settings, masked=pair.masked)
        self.held_out = texts.held(settings, masked=pair.masked)

    @classmethod
    @cache
    def of(cls, name: str, settings: Settings, text: str | None, work: str) -> Bench:
        """That of a pair, kept by the process."""
        texts = Texts.read(Path(text) if text else None)
        return cls(settings.pair(name), settings, texts, Path(work) / name)

    def models(self, job: Job) -> Line:
        """Train the teacher, and the student where it starts from a training of its own."""
        del job
        pair, found = self.pair, {}
        shapes = {"teacher": (pair.teacher, pair.teacher_steps, pair.teacher_rate)}
        if pair.start == "pretrained":
            shapes["student"] = (pair.student, self.settings.pretraining, pair.teacher_rate)
        for name, (shape, steps, rate) in shapes.items():
            model = models.build(shape, self.settings.length, seed=0, masked=pair.masked)
            models.train(model, self.train, steps, rate)
            models.keep(model, self.folder / name)
            found[f"{name}_ce"] = round(models.cross_entropy(model, self.held_out), 4)
            found[f"{name}_parameters"] = model.num_parameters()
        return found

    def maps(self, job: Job) -> Line:
        """The maps of all strategies, from one calibration."""
        with tempfile.TemporaryDirectory() as folder:
            args = self._arguments(job, folder)
            given = self._student(job), self._teacher(), [Logits(), HiddenStates()]
            ask = [Logits(), HiddenStates(layers=_asks)]
            run = prepare_run(given[0], given[1], ask, args, self._data())
            model = load_student(given[0], run.teacher)
            source = run.teacher.open(run.opening_request, args.device)
            evidence = survey(run, model, source, args)
        depths = self.pair.student.depth, self.pair.teacher.depth
        found = decided(*depths, evidence, self.settings.maps)
        assert evidence.similarity is not None
        return {
            "maps": {name: _rows(mapping) for name, mapping in found.items()},
            "origins": {name: mapping.origin for name, mapping in found.items()},
            "similarity": [[round(v, 5) for v in r] for r in evidence.similarity.values.tolist()],
        }

    def run(self, job: Job) -> Line:
        """Train a student, and what it came to on the held-out text."""
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            trainer = DistillTrainer(
                self._student(job),
                self._teacher(),
                self._objectives(job),
                self._arguments(job, folder),
                eval_dataset=self.held_out,
                **self._data(),
            )
            trainer.announces = False
            trainer.remove_callback(PrinterCallback)
            made = time.process_time() - start
            try:
                trainer.train()
            except FloatingPointError:
                return {"kl": None, "documents": [], "before": round(made, 2)}
            kl = float(trainer.evaluate()["eval_kl"])
        documents = self.documents(trainer.distiller.student)
        return {
            "kl": kl,
            "documents": [round(value, 6) for value in documents],
            "before": round(made, 2),
            **(_raced(trainer) if job.mode == "race" else {}),
        }

    @torch.no_grad()
    def documents(self, student: Any) -> list[float]:  # noqa: ANN401  any model
        """KL(teacher || student) of each held-out passage, mean over its rows."""
        auto: Any = AutoModelForMaskedLM if self.pair.masked else AutoModelForCausalLM
        teacher = auto.from_pretrained(self.folder / "teacher").eval()
        batch = collate(self.held_out)
        ids, labels = batch["input_ids"], batch["labels"]
        ours, theirs = student.eval()(input_ids=ids).logits, teacher(input_ids=ids).logits
        if not self.pair.masked:
            ours, theirs, labels = ours[:, :-1], theirs[:, :-1], labels[:, 1:]
        size, rows = ours.shape[-1], labels != -100
        kl = forward_kl(ours.reshape(-1, size), theirs.reshape(-1, size)).view(labels.shape)
        means: list[float] = ((kl * rows).sum(1) / rows.sum(1)).tolist()
        return means

    def _objectives(self, job: Job) -> list[Objective]:
        """Of a job."""
        if job.mode == "race":
            s = self.settings
            strategy = partial(auto_race, weights=s.weights, share=s.share, shortest=SHORTEST)
            hint = HiddenStates(layers=strategy, weight=_constant(1.0), gate=False, init=self._init)
            return [Logits(), hint]
        if job.mode == "shipped":
            layers = auto if job.mapping is None else self.mapping(job.mapping)
            return [Logits(), HiddenStates(layers=layers, weight=job.weight)]
        if job.mapping is None:
            return [Logits()]
        mapping = self.mapping(job.mapping)
        hint = HiddenStates(
            layers=mapping,
            weight=_constant(job.weight),
            gate=False,
            blockwise=job.blockwise,
            init=self._init,
        )
        return [Logits(), hint]

    @property
    def _init(self) -> Literal["random", "least_squares"] | None:
        """Of projectors; identities have none."""
        return None if self.pair.student.width == self.pair.teacher.width else self.settings.init

    def mapping(self, rows: Rows) -> LayerMap:
        """A map of this pair."""
        made = tuple(Row(s, teacher) for s, teacher in rows)
        return LayerMap(made, self.pair.student.depth, self.pair.teacher.depth, "of the benchmark")

    def _student(self, job: Job) -> Any:  # noqa: ANN401  a path or a spec
        return models.student(self.pair, self.settings, self.folder, job.blocks, job.seed)

    def _teacher(self) -> Local:
        return Local(str(self.folder / "teacher"))

    def _data(self) -> dict[str, Any]:
        return {"train_dataset": self.train, "data_collator": collate}

    def _arguments(self, job: Job, folder: str) -> TrainingArguments:
        """Of a job: the same for all arms but for the length where one is longer."""
        return TrainingArguments(
            folder,
            max_steps=max(job.steps, 1),
            seed=job.seed,
            learning_rate=self.pair.rate,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP_STEPS,
            adam_beta2=0.95,
            per_device_train_batch_size=self.settings.batch,
            per_device_eval_batch_size=self.settings.held_out,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )


def _asks(
    student_depth: int,
    teacher_depth: int,
    *,
    similarity: Any = None,  # noqa: ANN401  a Similarity
    cross: Any = None,  # noqa: ANN401  a Similarity
) -> LayerMap:
    """No strategy: asks for what calibration can measure."""
    del cross
    return auto(student_depth, teacher_depth, similarity=similarity)


def _constant(weight: float) -> partial[float]:
    """A weight as a schedule, which is taken as it is written: nothing fades."""
    return partial(schedules.constant, value=weight)


def _rows(mapping: LayerMap) -> list[Any]:
    """A map as JSON."""
    return [[row.student, [list(entry) for entry in row.teacher]] for row in mapping.rows]


def _raced(trainer: DistillTrainer) -> Line:
    """What a race chose and took."""
    hints = [o for o in trainer.run.objectives if isinstance(o, HiddenStates)]
    figures = [line.split("|") for line in trainer.run.told if "|" in line][1:]
    winner: Line = {"name": "none", "weight": 0.0, "blockwise": 0.0, "rows": None}
    for hint in hints:
        mapping = hint.layers
        assert isinstance(mapping, LayerMap)
        winner = {
            "name": mapping.origin,
            "weight": schedules.at(hint.weight, 0.0),
            "blockwise": hint.blockwise,
            "rows": _rows(mapping),
        }
    return {
        "winner": winner,
        "race_steps": sum(int(parts[0].split()[-1]) for parts in figures),
        "race": trainer.run.told,
    }
