"""Command line of every stage: strict flags on top of fire, one line for whatever ends it early, one log format.

Fire calls a function first and complains about unknown flags afterwards, and it ignores annotations. So fire only
collects the raw strings here; names and types are checked against the stage's signature before anything runs.
"""

import difflib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence

import fire
from loguru import logger

from glm_utils.ending import BROKEN_PIPE_CODE, describe_crash, flush_output, is_output_fault, open_missing_outputs
from glm_utils.logs import setup_logging
from glm_utils.signals import ignore_signals, interruption_note, signal_of, signals_heard

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


class UserError(ValueError):
    """Bad input: printed as one message without a traceback; the exit code is 1.

    The message says what was found, where (file and line), what was expected and what to do. It quotes texts as they
    are; the log makes them visible.

    Attributes:
        message: The message, which becomes one line.
        details: Further lines, e.g. one for each fault of a file.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *details]))
        self.message, self.details = message, tuple(details)


def run_cli(stage: Callable, argv: Sequence[str] | None = None, elsewhere: Mapping[str, str] | None = None) -> None:
    """Run a stage function as a command.

    Args:
        stage: Function with keyword-only, annotated arguments; its docstring is the `--help` text.
        argv: Command line without the program's name; `sys.argv[1:]` when None.
        elsewhere: Names that are not flags of the stage although people give them as such, with what to do instead.

    Raises:
        SystemExit: Code 1 after a `UserError` or an exception that nothing foresaw, 128 + N after signal N, 2 when
            fire itself refuses the command line, 141 when nobody reads the output any more.
    """
    open_missing_outputs()
    setup_logging()
    code = None
    with signals_heard(stage if argv is None else None):  # only a script is over when its stage is
        try:
            stage(**parse_args(stage, sys.argv[1:] if argv is None else argv, elsewhere))
        except BaseException as error:
            ignore_signals()
            code = _report(error, stage.__name__)
        code = flush_output(code)
    if code is not None:
        raise SystemExit(code)


def _report(error: BaseException, command: str) -> int:
    """Log what ended a command, in one line and the details of a `UserError`; return its exit code."""
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return error.code or 0
    signum = signal_of(error)
    if isinstance(error, UserError):
        for line in (error.message, *error.details):
            logger.error(line)
    elif isinstance(error, SystemExit):
        logger.error(str(error))
    elif signum is not None:
        logger.warning(interruption_note(signum))
        return 128 + signum
    elif not is_output_fault(error):
        logger.error(describe_crash(error, command))
    elif isinstance(error, BrokenPipeError):
        return BROKEN_PIPE_CODE
    return 1


def parse_args(stage: Callable, argv: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> dict:
    """Turn a command line into checked keyword arguments of a stage.

    Args:
        stage: The stage function.
        argv: Command line without the program's name.
        elsewhere: See `run_cli`.

    Returns:
        The arguments that were given, converted to their annotated types.

    Raises:
        UserError: A value without a flag, an unknown flag, a required flag that is missing, a flag without a value, or
            a value that does not fit the annotation.
    """
    parameters = inspect.signature(stage).parameters
    words, recorded = record_args(stage, argv)
    if words:
        flags = ", ".join(f"--{name}" for name in parameters)
        raise UserError(f"{' '.join(words)}: a value without a flag. Flags: {flags}")
    for name in recorded:
        if name not in parameters:
            hint = (elsewhere or {}).get(name) or nearest(name, parameters, "flags", prefix="--")
            raise UserError(f"unknown flag --{name}. {hint}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in recorded:
            raise UserError(f"--{name} is required; see --help")
    annotations = typing.get_type_hints(stage)
    for name in recorded:
        if _is_bare(name, argv) and bool not in union_members(annotations.get(name, str)):
            raise UserError(f"--{name} needs a value; see --help")
    return {name: convert(value, annotations.get(name, str), f"--{name}") for name, value in recorded.items()}


def _is_bare(name: str, argv: Sequence[str]) -> bool:
    """Return whether a flag was given without a value, which fire turns into True."""
    flags = (f"--{name}", f"--{name.replace('_', '-')}")
    followers = [*argv[1:], "--"]
    return any(word in flags and after.startswith("--") for word, after in zip(argv, followers, strict=True))


def record_args(stage: Callable, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Let fire split a command line and keep every value as the string that was typed.

    Args:
        stage: The stage function; it is not run.
        argv: Command line without the program's name.

    Returns:
        The values without a flag, and the flags that were given, unknown ones included.
    """
    words: list[str] = []
    recorded: dict[str, str] = {}

    @functools.wraps(stage)
    def recorder(*args: str, **kwargs: str) -> None:
        words.extend(args)
        recorded.update(kwargs)

    if not {"-h", "--help"} & set(argv):  # the help text of the plain function promises no "additional flags"
        stray = inspect.Parameter("stray", inspect.Parameter.VAR_POSITIONAL)
        unknown = inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)
        flags = [flag.replace(default=None) for flag in inspect.signature(stage).parameters.values()]
        # fire reads this attribute; the type of a wrapped function does not declare it
        recorder.__signature__ = inspect.Signature([stray, *flags, unknown])  # type: ignore[attr-defined]
        fire.decorators.SetParseFn(str)(recorder)
    fire.Fire(recorder, command=list(argv), name=f"{stage.__name__}.py")
    return words, recorded


def convert(text: str, annotation: object, where: str) -> object:
    """Convert one typed string to the annotated type.

    Args:
        text: The string as typed.
        annotation: The parameter's annotation: str, int, float, bool, None, Literal, list[str], or a union of these.
        where: What the error calls the value, e.g. --lora_rank.

    Raises:
        UserError: The string is not a value of this type.
    """
    members = union_members(annotation)
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    for member in members:
        value = _convert_to(text, member)
        if value is not None:
            return value
    raise UserError(f"{where}={text}: expected {type_in_words(annotation)}")


def _convert_to(text: str, member: object) -> object | None:
    """Convert to one type; None if the text is not a value of it."""
    if typing.get_origin(member) is typing.Literal:
        return text if text in typing.get_args(member) else None
    if typing.get_origin(member) is list:
        parts = [part.strip(" \"'") for part in text.strip("[]()").split(",")]
        return [part for part in parts if part] if "," in text or text.startswith(("[", "(")) else None
    if member is bool:
        word = text.lower()
        return True if word in TRUE_WORDS else False if word in FALSE_WORDS else None
    if member in (int, float):
        try:
            return member(text)
        except ValueError:
            return None
    return text if member is str else None


def union_members(annotation: object) -> tuple:
    """Return the members of a union, str last because every text is a str; any other annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(sorted(typing.get_args(annotation), key=lambda member: member is str))
    return (annotation,)


def type_in_words(annotation: object) -> str:
    """Name an annotation for an error message."""
    words = []
    for member in union_members(annotation):
        if typing.get_origin(member) is typing.Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif member is type(None):
            words.append("None")
        else:
            words.append(getattr(member, "__name__", str(member)))
    return " or ".join(words)


def as_list(paths: str | list[str] | None) -> list[str]:
    """Return the value of a flag that takes one path or several, or None, as a list."""
    return [paths] if isinstance(paths, str) else paths or []


def check_minimums(arguments: dict, minimums: dict[str, int]) -> None:
    """Refuse a flag whose number is below its minimum; None passes.

    Args:
        arguments: Flags by name.
        minimums: Lowest allowed values by name.

    Raises:
        UserError: The first number that is too small.
    """
    for name, minimum in minimums.items():
        if arguments[name] is not None and arguments[name] < minimum:
            raise UserError(f"--{name} {arguments[name]}: expected {minimum} or more")


def nearest(name: str, known: Iterable[str], noun: str, prefix: str = "") -> str:
    """Suggest the known name that was probably meant, or list them all.

    Args:
        name: The unknown name.
        known: All valid names.
        noun: What the names are, in the plural, e.g. flags.
        prefix: Put before each name, e.g. "--".
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {prefix}{close[0]}?"
    return f"Known {noun}: " + ", ".join(prefix + item for item in known)
