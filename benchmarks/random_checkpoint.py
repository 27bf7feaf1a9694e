"""Create a base checkpoint of 6B size with random fp16 weights, in the published layout, to measure with.

    python -m benchmarks.random_checkpoint --output_path /data/random-6b --family chatglm2-6b

The tokenizer is the small one of the tests.
"""

import json
from pathlib import Path

from benchmarks.harness.checkpoints import write_random_checkpoint
from glm_utils.cli import UserError, run_cli


def random_checkpoint(
    *, output_path: str, family: str = "chatglm2-6b", bin_files: bool = True, config_overrides: str = "{}"
) -> None:
    """Write the checkpoint, in shards.

    Args:
        output_path: Directory to create.
        family: chatglm-6b or chatglm2-6b.
        bin_files: pytorch_model-*.bin as published, else safetensors.
        config_overrides: JSON object of configuration values for another size, e.g. {"num_layers": 2}.
    """
    try:
        overrides = json.loads(config_overrides)
    except ValueError as error:
        raise UserError(f"--config_overrides {config_overrides}: {error}. Expected a JSON object") from None
    write_random_checkpoint(Path(output_path), family, bin_files, overrides)


if __name__ == "__main__":
    run_cli(random_checkpoint)
