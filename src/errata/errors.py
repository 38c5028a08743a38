"""Every error that a user can meet.

Each message says what is wrong, why, and what to do. The library raises them; the
command line shows the message without a traceback.

::

    ErrataError
    ├── RequestError          a request cannot be carried out as it is written
    │   └── RequestFileError  a file of requests or cases cannot be read (names the line)
    ├── ConfigError           a setting is unknown, out of range or contradicts another
    ├── ModelLoadError        a model or tokenizer cannot be loaded
    │   └── UnknownFamilyError  no anatomy for this model type
    ├── TokenizationError     a text cannot be aligned with its tokens
    ├── HookError             a layer did not run, or ran in an unexpected way
    ├── NotFiniteError        NaN or infinity in weights, keys, targets or moments
    ├── SolveError            the linear system of an edit has no trustworthy solution
    ├── MomentError           second moments are missing, too thin or do not fit
    ├── TargetError           the optimisation of a target did not reach its goal
    ├── FitError              an editor cannot be fitted, or has not been fitted yet
    ├── EditFileError         an edit file is cut short, altered or of another format
    ├── WrongModelError       an edit was made for another model
    ├── EditStateError        an edit is applied twice, or undone without being applied
    ├── DatasetError          a data set is absent or not in its published format
    ├── FactFileError         a file of facts cannot be grown into a model
    ├── GrowError             growing a model failed or cannot be resumed
    ├── ClusterError          work cannot be spread over processes or machines
    └── StorageError          a file cannot be written: full disk, missing permission
"""

from __future__ import annotations


class ErrataError(Exception):
    """Root of all errors that errata raises on purpose."""


class RequestError(ErrataError):
    """A request cannot be carried out as it is written."""


class RequestFileError(RequestError):
    """A file of requests or cases cannot be read; the message names the line."""


class ConfigError(ErrataError):
    """A setting is unknown, out of range or contradicts another."""


class ModelLoadError(ErrataError):
    """A model or its tokenizer cannot be loaded."""


class UnknownFamilyError(ModelLoadError):
    """There is no anatomy for this model type."""


class TokenizationError(ErrataError):
    """A text cannot be aligned with its tokens."""


class HookError(ErrataError):
    """A layer did not run inside a context that needs it, or ran in an unexpected way."""


class NotFiniteError(ErrataError):
    """NaN or infinity in weights, keys, targets or moments."""


class SolveError(ErrataError):
    """The linear system of an edit has no trustworthy solution."""


class MomentError(ErrataError):
    """Second moments are missing, too thin, or do not fit the model."""


class TargetError(ErrataError):
    """The optimisation of one or more targets did not reach its goal."""


class FitError(ErrataError):
    """An editor cannot be fitted to a model, or has not been fitted yet."""


class EditFileError(ErrataError):
    """An edit file is cut short, altered, or of another format."""


class WrongModelError(ErrataError):
    """An edit was made for another model."""


class EditStateError(ErrataError):
    """An edit is applied twice, or undone without being applied."""


class DatasetError(ErrataError):
    """A data set is absent, or not in its published format."""


class FactFileError(ErrataError):
    """A file of facts cannot be turned into a corpus."""


class GrowError(ErrataError):
    """Growing a model failed, or a run cannot be resumed."""


class ClusterError(ErrataError):
    """Work cannot be spread over processes or machines."""


class StorageError(ErrataError):
    """A file cannot be written: a full disk, a missing folder or permission."""
