"""How a wrapped student is written, read back and published: always a plain transformers model."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from llm_distill import card, publishing, saving

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from torch import nn

    from llm_distill.card import CardFacts, DataFacts
    from llm_distill.distiller import Distiller
    from llm_distill.preparation import Run

logger = logging.getLogger(__name__)

OTHER = "not the teacher's; nothing compared the two models token by token"
"""What the card says of a student's tokenizer that is not the teacher's."""


class StudentTrainer(Trainer):
    """A Trainer whose model is a `Distiller`: what it saves, loads and pushes is the student.

    A checkpoint also holds what the terms learned; a saved or pushed student never does.

    Attributes:
        run: What was prepared.
        data: What the card says of the training data; by default what that says of itself.
        evaluation_data: The same for the evaluation data.
        quantised: What the card says of quantised teachers.
    """

    run: Run
    data: DataFacts | None = None
    evaluation_data: DataFacts | None = None
    quantised: tuple[str, ...] = ()
    _in_checkpoint = False

    @property
    def distiller(self) -> Distiller:
        """Student and terms, whatever wraps them."""
        module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return cast("Distiller", module)

    @property
    def student(self) -> nn.Module:
        """The model being trained, a plain transformers or PEFT model."""
        return self.distiller.student

    def end(self) -> None:
        """As in Trainer, DDP's wrapper before the process group.

        The other way round, the wrapper takes the group's last reference along, and joins gloo's
        threads while it holds the interpreter's lock that they may wait for: a run that is done
        and never ends.
        """
        self.accelerator.wait_for_everyone()
        self.model_wrapped = cast("nn.Module", self.model)
        self.accelerator.free_memory()
        super().end()

    # Writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002  as Trainer
        """Write the plain student; under sharded FSDP its weights are gathered first."""
        if not self._sharded_state_dicts():
            super().save_model(output_dir, _internal_call)
            return
        if self._in_checkpoint and output_dir is not None and self.args.should_save:
            saving.save_maps(self.distiller, Path(output_dir))
        if not self._in_checkpoint or self.args.push_to_hub:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            self._save(
                output_dir, get_model_state_dict(cast("nn.Module", self.model), options=options)
            )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Student and tokenizer; in a checkpoint also the terms. No pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else cast("str", self.args.output_dir))
        saving.save_student(self.distiller, folder, state_dict)
        if self._in_checkpoint:
            saving.save_terms(self.distiller, folder, state_dict)
            if state_dict is None:  # else it is in the state of the whole
                saving.save_teacher(self.distiller, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401  as Trainer
        """As in Trainer."""
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    # Reading

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Student and terms; FSDP and DeepSpeed load the whole wrapper themselves."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            saving.load_maps(self.distiller, Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        saving.load_student(self.distiller, folder)
        saving.load_terms(self.distiller, folder)
        saving.load_teacher(self.distiller, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer; DeepSpeed has loaded the wrapper without asking for its maps."""
        if self.is_deepspeed_enabled and checkpoint is not None:
            saving.load_maps(self.distiller, Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """As in Trainer, strictly."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        self._load_from_checkpoint(cast("str", self.state.best_model_checkpoint))

    def _sharded_state_dicts(self) -> bool:
        """Whether FSDP writes one file for each rank."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return plugin is not None and "SHARDED" in str(plugin.state_dict_type)

    # Publishing

    def card_facts(self) -> CardFacts:
        """What the model card tells."""
        run, student = self.run, self.student
        teacher = getattr(self, "_source", None)
        whole = teacher.model if run.teacher_request.logits and teacher is not None else None
        return card.CardFacts(
            name=publishing.name_of(self.args),
            student=publishing.model_facts(run.model, run.student, student),
            teacher=publishing.model_facts(run.teacher, run.teacher.spec, whole),
            objectives=publishing.objective_facts(run.objectives),
            layer_map=publishing.layer_maps(run.terms),
            quantised=self.quantised,
            evaluation_data=self.evaluation_data or publishing.data_facts(self.eval_dataset),
            tokenizer=None if run.tokenizers.theirs is None else OTHER,
            task="text-generation" if run.shift else "fill-mask",
            **publishing.run_facts(
                self.args,
                self.state,
                student=student,
                data=self.data or publishing.data_facts(self.train_dataset),
            ),
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card into the output folder."""
        del args, kwargs
        if self.is_world_process_zero():
            card.write(self.card_facts(), Path(cast("str", self.args.output_dir)))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,  # noqa: FBT001, FBT002  Trainer's signature
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,  # noqa: FBT001  Trainer's signature
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload the plain student, its tokenizer and its card, and nothing else.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait; otherwise a future is returned.
            token: Instead of the one that `hf auth login` or HF_TOKEN gives.
            revision: Branch to commit to.
            private: Whether the repository is private, if it is made now.
            kwargs: Taken for Trainer's sake and not used: the card is made from the run.

        Returns:
            The commit; None on all ranks but the first.
        """
        del kwargs
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return cast("CommitInfo", None)
        self.create_model_card()
        self._finish_current_push()
        folder = cast("str", self.args.output_dir)
        branch = revision if revision is not None else self.args.hub_revision
        upload = partial(self._upload, folder, commit_message, token, branch)
        return upload() if blocking else cast("CommitInfo", HfApi().run_as_future(upload))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the student of a checkpoint in the background."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pushes = self.__dict__.setdefault("_pushes", [])
        if not (self.args.hub_always_push or all(job.done() for job in pushes)):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        card.write(self.card_facts(), Path(checkpoint_folder))
        folder = publishing.snapshot(Path(checkpoint_folder), Path(checkpoint_folder).parent)
        message = f"Training in progress, step {self.state.global_step}"
        upload = partial(self._upload_once, folder, message)
        pushes.append(HfApi().run_as_future(upload))

    def _upload_once(self, folder: Path, message: str) -> CommitInfo:
        """Upload a snapshot, and delete it."""
        token, branch = self.args.hub_token, self.args.hub_revision
        try:
            return self._upload(str(folder), message, token, branch)
        finally:
            shutil.rmtree(folder)

    def _upload(
        self, folder: str, message: str | None, token: str | None, revision: str | None
    ) -> CommitInfo:
        """The published files of a folder, in one commit."""
        return HfApi().upload_folder(
            repo_id=cast("str", self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token,
            revision=revision,
            allow_patterns=list(publishing.PUBLISHED),
        )

    def _finish_current_push(self) -> None:
        """Wait for background pushes, and say which of them failed: the local copy is whole."""
        for job in self.__dict__.pop("_pushes", []):
            error = job.exception()
            if error is not None:
                logger.warning("A push to %s failed: %s", self.hub_model_id, error)
