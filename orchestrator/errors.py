"""Every error that a user can meet, in one tree.

OrchestratorError                 exit 1: it ran and failed
├── RefusedError                  exit 2: refused before training starts, or a place or run that cannot be used
│   ├── JobError                  the job itself: unknown key, wrong type, impossible value
│   ├── DataError                 the data: missing, corrupt, contradictory, unusable labels
│   ├── PluginError               a plugin: missing, broken, two of one name
│   ├── MissingExtraError         a library of an extra is not installed
│   └── ChangedError              data, backbone or job differ from those that the run began with
├── BadSampleError                one sample cannot be read; raised by a plugin's `decode`
├── ContractError                 a plugin breaks the contract; raised by `orchestrator.testing`
├── WeightsError                  a checkpoint does not fit its own architecture
├── CheckpointError               no valid checkpoint where there should be one
├── TrainingError                 a worker died, the loss is not finite, a sample or a feature cannot be read
└── InterruptedRunError           exit 130: stopped on request; the same command goes on
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

REASONS: dict[str, str] = {
    "usage": "the command or the job: an unknown key, a wrong type, an impossible value",
    "data": "the data: not found, unreadable, or labels that cannot be learnt from",
    "plugin": "no such modality, a plugin that does not import, or two that claim one name",
    "missing_extra": "a library is needed that this installation lacks",
    "changed": "data, backbone or job are not those that the run began with",
    "damaged": "a file of a run of ours is gone, or was cut or changed by something else",
    "busy": "another process is working on this run",
    "not_built": "declared, but not built yet in this version",
    "wrong_modality": "the backbone takes another kind of input",
    "two_modalities": "the backbone takes two kinds of input at once",
    "unknown_type": "the backbone's type is not in this version's rows",
    "no_head": "a known type without a classification head",
    "unsupported": "a known type that cannot be used, for the reason given",
    "adapter_only": "the repository holds an adapter, not a model",
    "pickle_only": "the weights are pickles only, and are not opened",
    "gguf_only": "the weights are GGUF only",
    "no_weights": "the repository holds no weights",
    "no_config": "there is no config.json",
    "bad_config": "a metadata file is broken, or contradicts another one",
    "no_model_type": "config.json names neither a model_type nor a timm architecture",
    "no_processor": "the file that says how input is prepared is missing",
    "quantised": "the weights are quantised and cannot be trained",
    "not_found": "no such repository, directory or run",
    "bad_revision": "the repository has no such revision",
    "gated": "the repository asks for a licence to be accepted first",
    "unauthorised": "the Hub or a cluster did not accept the token, or a store the credentials",
    "offline": "the Hub cannot be reached, and the files are not cached; or a store does not answer",
    "fixed_size": "the backbone takes one input size only",
    "channels": "the data's channels cannot be adapted to the backbone's",
    "resources": "the job asks for more than the machine or the cluster has",
    "cluster": "a node of the cluster lacks what the job needs",
}
"""The published list of `reason` values, each with what it means."""


class OrchestratorError(Exception):
    """An error with what was expected and what to do about it.

    `exit_code` is the command line's; `str(error)` is one line for a log; the parts are for a screen.
    """

    exit_code = 1
    reason = "failed"

    def __init__(self, message: str, *, expected: str = "", mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.mend = mend

    def __str__(self) -> str:
        parts = [self.message]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.mend:
            parts.append(f"mend: {self.mend}")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, str]:
        """The error as `--json` prints it."""
        return {
            "reason": self.reason,
            "message": self.message,
            "expected": self.expected,
            "mend": self.mend,
        }


class RefusedError(OrchestratorError):
    """Refused before the start. `reason` is one of `REASONS`."""

    exit_code = 2

    def __init__(self, reason: str, message: str, *, expected: str = "", mend: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(message, expected=expected, mend=mend)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:  # crosses process borders with all its parts
        return _rebuild, (type(self), self.__dict__, self.args)


class JobError(RefusedError):
    """The job itself cannot be meant: unknown key, wrong type, impossible value."""

    def __init__(self, message: str, *, expected: str = "", mend: str = "") -> None:
        super().__init__("usage", message, expected=expected, mend=mend)


class DataError(RefusedError):
    """The data cannot be learnt from as it is. The message names the file, row or class."""

    def __init__(self, message: str, *, expected: str = "", mend: str = "") -> None:
        super().__init__("data", message, expected=expected, mend=mend)


class PluginError(RefusedError):
    """A modality plugin is missing, broken, or claims a name that is taken."""

    def __init__(self, message: str, *, expected: str = "", mend: str = "") -> None:
        super().__init__("plugin", message, expected=expected, mend=mend)


class MissingExtraError(RefusedError):
    """A library is missing that an extra of this distribution installs."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            "missing_extra",
            f"this needs {library}, which is not installed",
            expected=f"the extra [{extra}]",
            mend=f"pip install 'orchestrator[{extra}]'",
        )


class ChangedError(RefusedError):
    """Something differs from what the run began with, so that going on would mix two experiments."""

    def __init__(self, message: str, *, expected: str = "", mend: str = "") -> None:
        super().__init__("changed", message, expected=expected, mend=mend)


class BadSampleError(OrchestratorError):
    """One sample cannot be read. Raised by a plugin's `decode`; the core adds which sample it was."""

    reason = "bad_sample"


class ContractError(OrchestratorError):
    """A plugin breaks the contract: which field, what was found. Raised by `orchestrator.testing.check_modality`."""

    reason = "contract"

    def __init__(self, field: str, found: str, *, expected: str = "", mend: str = "") -> None:
        super().__init__(f"{field}: {found}", expected=expected, mend=mend)
        self.field = field
        self.found = found


@contextlib.contextmanager
def calling(field: str, what: str, expected: str = "") -> Iterator[None]:
    """What the plugin raises becomes a `ContractError` of that field, with the trace behind it."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(
            field, f"{what} raises {type(error).__name__}: {error}", expected=expected,
            mend=getattr(error, "mend", "") or "the trace above shows where",
        ) from error  # fmt: skip


class WeightsError(OrchestratorError):
    """The weights do not fit the architecture that their own config.json describes."""

    reason = "weights"


class CheckpointError(OrchestratorError):
    """There is no valid checkpoint where there should be one."""

    reason = "checkpoint"


class TrainingError(OrchestratorError):
    """Training cannot go on: a worker died too often, or the loss is not finite."""

    reason = "training"


class InterruptedRunError(OrchestratorError):
    """Stopped on request. The run is resumable: the same command goes on from where it stopped."""

    exit_code = 130
    reason = "interrupted"


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def counted(number: int, what: str) -> str:
    """`1 sample`, `2 samples`, `1,000 samples`: of things that an s makes more of."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def fault_of_sample(error: Exception) -> BadSampleError | None:
    """What a tokenizer, a processor or a network raises on one sample, as that sample's fault.

    None where it is no sample's: an error of ours, a library that is missing, no memory.
    """
    if isinstance(error, BadSampleError):
        return error
    if isinstance(error, (OrchestratorError, ImportError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return None
    if isinstance(error, OSError):
        return BadSampleError(f"cannot be read: {error.strerror or error}")
    return BadSampleError(f"{type(error).__name__}: {first_line(error)}")


def marked(name: str) -> str:
    """The name, in quotation marks where one cannot see where it ends."""
    return f"'{name}'" if name != name.strip() or "," in name else name


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """`did you mean head?`, '' where no name is like the one that was given."""
    lower = {name.lower(): name for name in reversed(list(names))}
    near = difflib.get_close_matches(str(given).lower(), lower, n=1)
    return f"did you mean {marked(lower[near[0]])}?" if near else ""


EXTRA_LIBRARIES = frozenset(
    (
        "numpy",
        "pyarrow",
        "ray",
        "safetensors",
        "tensorboardX",
        "torch",
        "transformers",
        "PIL",
        "tokenizers",
        "sentencepiece",
        "soundfile",
        "soxr",
        "timm",
        "torchvision",
    )
)
"""Libraries that a bare installation lacks."""
_EXTRA_OF = {"soundfile": "audio", "soxr": "audio", "tokenizers": "text", "sentencepiece": "text"}
"""Of libraries that the extra `image` does not bring."""


def missing_extra(error: ImportError, extra: str = "") -> MissingExtraError | None:
    """The refusal for a library of an extra that is not installed, None if the import failed for another reason.

    `extra` is the modality's; without one, the extra that brings the library: `image` for those that all bring.
    """
    library = (error.name or "").split(".")[0]
    return MissingExtraError(library, extra or _EXTRA_OF.get(library, "image")) if library in EXTRA_LIBRARIES else None


FAILED = "the storage failed: "


def storage_failed(error: RefusedError) -> OrchestratorError:
    """What a storage refuses to a job that runs already, which is no refusal before its start; other errors as is."""
    if error.reason not in ("offline", "unauthorised", "not_found"):
        return error
    return OrchestratorError(
        f"{FAILED}{error.message}", expected=error.expected,
        mend=f"{error.mend}; then the same command goes on from the last checkpoint",
    )  # fmt: skip


def _rebuild(cls: type[RefusedError], state: dict[str, object], args: tuple[object, ...]) -> RefusedError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error
