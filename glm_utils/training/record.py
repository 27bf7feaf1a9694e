"""run_config.json of a training run: a merge reads it, a resumed run compares itself with it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from glm_utils.encoding import EncodedExamples
from glm_utils.files import write_json
from glm_utils.model_card import adapter_card
from glm_utils.run_record import FORMAT_VERSION, RUN_CONFIG_NAME, git_commit, versions
from glm_utils.training.manifest import STAGE
from glm_utils.training.resume import ADAPTER_NAMES, is_checkpoint_of, remove_earlier_run, remove_files
from glm_utils.training.settings import TrainingSettings

CARD_KEYS = ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim")


@dataclass(frozen=True)
class TrainingRecord:
    """The content of run_config.json.

    Attributes:
        stage: Name of the script.
        arguments: Its flags, resolved.
        base: Name and family of the base model.
        identity: Settings that a resumed run must share.
        training_args: The resolved TrainingArguments.
        data: Counts of examples and tokens, under "train" and, optionally, "eval".
        data_files: The files with their examples and how many of them are used, likewise.
        versions: Versions of Python and the packages, and the name of the device.
        commit: Commit of this project; None outside a git repository.
        format_version: Version of run_config.json and of the checkpoints it is copied into.
    """

    stage: str
    arguments: dict
    base: dict[str, str]
    identity: dict
    training_args: dict
    data: dict[str, dict[str, int]]
    data_files: dict[str, list[dict]]
    versions: dict[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=git_commit)
    format_version: int = FORMAT_VERSION

    def card(self, results: dict) -> str:
        """Return the adapter's model card.

        Args:
            results: Metrics as in all_results.json.
        """
        hashes = ("sha256", "fingerprint")
        settings = {key: value for key, value in self.identity.items() if not key.endswith(hashes)}
        settings.update({key: self.training_args[key] for key in CARD_KEYS})
        return adapter_card(asdict(self), results, settings)


def make_record(settings: TrainingSettings, encoded: dict[str, EncodedExamples]) -> TrainingRecord:
    """Make the record of a run.

    Args:
        settings: The run's settings.
        encoded: Its encoded examples, under "train" and, optionally, "eval".
    """
    return TrainingRecord(
        stage=STAGE,
        arguments=settings.described_arguments,
        base={"name": settings.base.name, "family": settings.base.family.name},
        identity=settings.identity,
        training_args=settings.training_args.to_dict(),
        data={name: part.counts for name, part in encoded.items()},
        data_files=settings.data.record(),
    )


def begin_run(settings: TrainingSettings, record: TrainingRecord, checkpoint: Path | None) -> None:
    """Write run_config.json; delete an earlier run's output, or its adapter if this run resumes from it.

    So an adapter is always that of the last step of the run that is there. It is called when the first step is due:
    a setting that the Trainer refuses does not cost the earlier run.
    """
    if settings.training_args.process_index != 0:
        return
    if is_checkpoint_of(checkpoint, settings.output_dir):
        remove_files(settings.output_dir, ADAPTER_NAMES)
    else:
        remove_earlier_run(settings.output_dir, settings.args_file.overwrite_output_dir)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings.output_dir / RUN_CONFIG_NAME, asdict(record))
