"""Resolve the arguments of an evaluation (two models, data, probe, output) and refuse what cannot be judged.

Nothing here reads a weight of a base model.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.data import Example
from glm_utils.disk import hidden_sibling
from glm_utils.evaluation.attributes import AttributeVocabulary, read_vocabulary
from glm_utils.evaluation.metrics import check_packages
from glm_utils.evaluation.probe import ProbeQuestion, read_probe, thin_out
from glm_utils.evaluation.two_models import Side, with_prompt_text
from glm_utils.files import check_apart, check_writable
from glm_utils.inference.batch import GenerationSettings
from glm_utils.limits import EncodingLimits
from glm_utils.output_dir import find_place
from glm_utils.run_record import RUN_CONFIG_NAME, read_run_config

STAGE = "evaluate_adapter"
DEFAULT_LIMITS = {"max_input_length": 512, "max_output_length": 1536}  # those of train_qlora.py
REMEDY = "an int4 model, --load_in_4bit, or a smaller --batch_size"


@dataclass(frozen=True)
class EvaluationJob:
    """A checked evaluation.

    Attributes:
        before: The first model: the base, or the first of two paths.
        after: The second one: the base with its adapter, or the second of two paths.
        examples: What is judged, in the order of the files; an answer is empty where the data has none.
        vocabulary: Attribute values of the data; None: its prompts do not list attributes.
        probe: General questions.
        limits: Longest prompt and answer.
        generation: How answers are generated.
        batch_size: Answers at once; None: what fits.
        output_dir: Where the report goes.
        arguments: The flags as given.
    """

    before: Side
    after: Side
    examples: Sequence[Example]
    vocabulary: AttributeVocabulary | None
    probe: list[ProbeQuestion]
    limits: EncodingLimits
    generation: GenerationSettings
    batch_size: int | None
    output_dir: Path
    arguments: dict

    @property
    def is_adapter(self) -> bool:
        """Whether one model is compared without and with its adapter."""
        return self.before.source is self.after.source

    @property
    def has_same_tokens(self) -> bool:
        """Whether losses per token can be compared: both models read the same vocabulary."""
        paths = [side.source.checkpoint.vocabulary_path for side in (self.before, self.after)]
        return self.is_adapter or paths[0].read_bytes() == paths[1].read_bytes()


def find_limits(sides: Sequence[Side]) -> EncodingLimits:
    """Return the limits of a training, recorded beside the adapter; its defaults for models without an adapter."""
    adapters = [side.source.adapter for side in sides if side.source.adapter]
    recorded = adapters[0].run_config.get("arguments", {}) if adapters else {}
    found = {key: value for key, value in recorded.items() if key in DEFAULT_LIMITS and value is not None}
    return EncodingLimits(**DEFAULT_LIMITS | found)


def choose_examples(examples: Sequence[Example], num_samples: int, seed: int) -> Sequence[Example]:
    """Draw the examples that are judged, in the order of the files.

    Args:
        examples: All of the data.
        num_samples: How many; their number or more: all.
        seed: Seed of the draw.
    """
    if num_samples >= len(examples):
        return examples
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), num_samples))]


def choose_probe(probe: bool | int) -> list[ProbeQuestion]:
    """Return the probe, a part of it, or nothing.

    Args:
        probe: True: all; False: none; or how many questions.

    Raises:
        UserError: A negative number.
    """
    if probe is False or probe == 0:
        return []
    questions = read_probe()
    if probe is True:
        return questions
    if probe < 0:
        raise UserError(f"--probe {probe}: expected true, false or a number of questions, at most {len(questions)}")
    return thin_out(questions, probe)


def check_output_dir(output_dir: Path, sides: Sequence[Side]) -> None:
    """Refuse, before any work, an output directory that holds or lies in something else.

    Raises:
        UserError: It overlaps a model, cannot be written to, or is the output of another stage.
    """
    inputs = [side.source.checkpoint.directory for side in sides]
    inputs += [side.source.adapter.directory for side in sides if side.source.adapter]
    check_apart(output_dir, inputs, "--output_dir")
    check_writable(output_dir, "--output_dir")
    if hidden_sibling(output_dir / RUN_CONFIG_NAME, "incomplete").is_dir():
        return  # an evaluation was killed when it moved its files here
    if find_place(output_dir, "--output_dir").entries and read_run_config(output_dir).get("stage") != STAGE:
        raise UserError(
            f"--output_dir {output_dir}: not empty, and no {RUN_CONFIG_NAME} in it says that it holds an earlier "
            "evaluation. Give another directory"
        )


def make_job(
    sides: tuple[Side, Side],
    examples: Sequence[Example],
    output_dir: Path,
    generation: GenerationSettings,
    num_samples: int,
    prompt_text: str | None = None,
    probe: bool | int = True,
    batch_size: int | None = None,
    arguments: dict | None = None,
) -> EvaluationJob:
    """Check and put together an evaluation.

    Args:
        sides: The two models.
        examples: Those of the data; they may lack answers.
        output_dir: Where the report goes.
        generation: How answers are generated; its seed also draws the examples.
        num_samples: Examples to judge.
        prompt_text: Text in front of every question; None: that of the training.
        probe: All, none, or how many of the general questions.
        batch_size: Answers at once; None: what fits.
        arguments: The flags, for run_config.json.

    Raises:
        UserError: Packages are missing, a directory that cannot be written to, texts before the questions that differ,
            or models that do not fit into the free memory.
    """
    check_packages()
    sides = with_prompt_text(sides, prompt_text)
    check_output_dir(output_dir, sides)
    job = EvaluationJob(
        before=sides[0],
        after=sides[1],
        examples=choose_examples(examples, num_samples, generation.seed),
        vocabulary=read_vocabulary([example.query for example in examples]),
        probe=choose_probe(probe),
        limits=find_limits(sides),
        generation=generation,
        batch_size=batch_size,
        output_dir=output_dir,
        arguments=arguments or {},
    )
    check_fit(job)
    return job


def check_fit(job: EvaluationJob) -> None:
    """Refuse a model that the free memory does not hold, before anything is loaded.

    Raises:
        UserError: The estimate exceeds what is free.
    """
    num_tokens = job.limits.max_input_length + job.generation.max_new_tokens
    for side in {id(side.source): side for side in (job.before, job.after)}.values():
        context = side.source.checkpoint.context_length or num_tokens
        side.source.check_fits(job.batch_size or 1, min(num_tokens, context), REMEDY)
