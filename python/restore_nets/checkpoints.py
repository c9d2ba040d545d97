"""Checkpoints: published ones read safely, our own written whole and rebuilt from themselves.

Our files are safetensors whose metadata entry ``model`` holds, as JSON, the keywords of
``create_model``: ``{"name": "ddsa", "dim": 24, ...}``. The entry ``task``, if there, holds those of
``create_task``: what the weights were trained for.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restore_nets.files import written_whole
from restore_nets.models import create_model, list_models

if TYPE_CHECKING:
    from restore_nets.tasks import Task

# safetensors is imported where it is used: the networks themselves run with torch alone.

METADATA_KEY, TASK_KEY = "model", "task"
_WRAPPINGS = ("params_ema", "params", "state_dict", "model")  # the averaged weights first
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_LISTED = 5

StrPath = str | os.PathLike[str]


def load_checkpoint(model: nn.Module, path: StrPath, strict: bool = True) -> None:
    """Load the weights of a checkpoint into a model: all of them, or none when they do not fit.

    Reads ``.safetensors`` files and, under any other suffix, files of ``torch.save``, of which only
    tensors are unpickled. The state dict may be wrapped in ``params_ema``, ``params``, ``state_dict``
    or ``model`` (taken in this order) and its keys prefixed by ``module.``.

    Args:
        model: keeps its dtype and device.
        path: the file.
        strict: every key of the model must be in the file and the other way round; otherwise the
            keys that both have are loaded.

    Raises:
        ValueError: the file is no checkpoint, or its keys or shapes do not fit; the message says which.
        OSError: the file cannot be opened.
    """
    state = _read_state_dict(Path(path))
    own = model.state_dict()
    problems = _mismatches(own, state, strict)
    if problems:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=strict)


def save_checkpoint(
    model: nn.Module, path: StrPath, config: Mapping[str, Any], task: Mapping[str, Any] | None = None
) -> None:
    """Write a model's weights to a safetensors file that ``load_model`` can rebuild the model from.

    The file is written whole or not at all: an existing one is replaced in the last step.

    Args:
        model: any network of ``create_model``.
        path: ends in ``.safetensors``; its folder exists.
        config: the keywords that ``create_model`` made the model with, ``name`` included.
        task: those of ``create_task`` that say what it was trained for, for ``load_task``.

    Raises:
        ValueError: another suffix, or a config that does not make a model of these keys and shapes.
        TypeError: a config that ``create_model`` does not take.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if not _is_safetensors(path):
        raise ValueError(f"path must end in .safetensors; got {path}")
    # Copies, for the format refuses keys that share memory (one activation in several places).
    state = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, x in model.state_dict().items()
    }
    state = _without_prefixes(state)
    problems = _mismatches(_skeleton(config).state_dict(), state, strict=True)
    if problems:
        raise ValueError(f"config does not describe this model: {'; '.join(problems)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    metadata = {METADATA_KEY: json.dumps(dict(config)), "format": "pt"}
    if task is not None:
        metadata[TASK_KEY] = json.dumps(dict(task))
    with written_whole(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def load_model(path: StrPath, name: str | None = None, **options: Any) -> nn.Module:
    """The network of a checkpoint, with its weights, in evaluation mode on the CPU.

    Args:
        path: a file of ``save_checkpoint``, or any other checkpoint together with name and options.
        name: the network, for files that do not say it (published ``.pth`` files); takes the place
            of what the file says.
        options: of that network, as for ``create_model``.

    Raises:
        ValueError, TypeError, OSError: as ``load_checkpoint`` and ``create_model``; also for a file
            that does not name its network when ``name`` is not given.

    Example:
        >>> model = load_model("deraining.pth", "drsformer", mefc=False)
    """
    path = Path(path)
    if name is not None:
        model = create_model(name, **options)
    elif options:
        raise TypeError(f"name must be given with options ({', '.join(options)}); got None")
    else:
        model = _model_of(path)
    load_checkpoint(model, path)
    return model.eval()


def _skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The network that a config describes, without memory for its weights."""
    if "name" not in config:
        raise ValueError(f"config must have the entry 'name'; got {', '.join(config) or 'nothing'}")
    with torch.device("meta"):
        return create_model(**config)


def _model_of(path: Path) -> nn.Module:
    """The freshly initialised network that the file's metadata describes."""
    config = _read_config(path)
    try:
        return create_model(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a network that cannot be made: {error}") from error


def load_task(path: StrPath) -> Task | None:
    """What the weights of a file of ``save_checkpoint`` were trained for; None where it does not say it.

    Raises:
        ValueError: the file names a task that there is not, or is not readable.
        OSError: it cannot be opened.
    """
    from restore_nets.tasks import create_task

    path = Path(path)
    metadata = _read_metadata(path)
    if TASK_KEY not in metadata:
        return None
    try:
        return create_task(**_read_keywords(path, metadata, TASK_KEY))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a task that cannot be made: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The keywords of ``create_model`` that a file of ``save_checkpoint`` holds."""
    metadata = _read_metadata(path)
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} does not say which network it is for; name one of {', '.join(list_models())} "
            "(on the command line: --model NAME)"
        )
    return _read_keywords(path, metadata, METADATA_KEY)


def _read_metadata(path: Path) -> Mapping[str, str]:
    if not _is_safetensors(path):
        _check_opens(path)
        return {}
    with _open_safetensors(path) as file:
        return file.metadata() or {}


def _read_keywords(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        keywords = json.loads(metadata[key])
    except json.JSONDecodeError:
        keywords = None
    if not isinstance(keywords, dict) or not isinstance(keywords.get("name"), str):
        what = "network" if key == METADATA_KEY else key
        raise ValueError(f"{path} must describe its {what} as JSON with a name; got {metadata[key]!r}")
    return keywords


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights of a file by name, without wrapping and prefixes."""
    payload: Any = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if isinstance(payload, Mapping):
        wrapping = next((key for key in _WRAPPINGS if isinstance(payload.get(key), Mapping)), None)
        payload = payload if wrapping is None else payload[wrapping]
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path} must hold tensors by name; it holds one {type(payload).__name__}")
    if not payload:
        raise ValueError(f"{path} must hold tensors by name; it is empty")
    others = [str(name) for name, x in payload.items() if not (isinstance(name, str) and _is_weight(x))]
    if others:
        wrappings = ", ".join(_WRAPPINGS)
        raise ValueError(
            f"{path} must hold tensors by name, at the top or in one of {wrappings}; "
            f"{_listed(others)} {'is' if len(others) == 1 else 'are'} something else"
        )
    return _without_prefixes(payload)


def _is_weight(x: Any) -> bool:
    """Whether x can be copied into a parameter."""
    if not isinstance(x, Tensor) or x.is_nested:
        return False
    return x.layout == torch.strided and x.device.type == "cpu" and x.is_floating_point()


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): x for name, x in state.items()}
    return state


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    _check_opens(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({_first_line(error)})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _check_opens(path: Path) -> None:
    """Raise the OSError that names the file, where a library's own error would not."""
    with path.open("rb"):
        pass


def _read_torch(path: Path) -> Any:
    """What a file of torch.save holds, if that is nothing but tensors and plain containers."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickles of other programs, which are then refused
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can trip the unpickler in any way
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused:
                raise ValueError(
                    f"{path} holds more than tensors ({refused[1]}); it is not loaded"
                ) from error
            # For files of another kind torch advises at length to load them unsafely.
            unpickling = isinstance(error, pickle.UnpicklingError)
            reason = "not written by torch.save" if unpickling else _first_line(error)
            raise ValueError(f"{path} is not a readable checkpoint ({reason})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _mismatches(model: Mapping[str, Tensor], file: Mapping[str, Tensor], strict: bool) -> list[str]:
    """What keeps the file's tensors out of the model, one entry per kind; empty when they fit."""
    missing = [name for name in model if name not in file]
    unexpected = [name for name in file if name not in model]
    shapes = [
        f"{name} (expected {tuple(x.shape)}, got {tuple(file[name].shape)})"
        for name, x in model.items()
        if name in file and file[name].shape != x.shape
    ]
    if not strict:
        missing, unexpected = ([], []) if len(missing) < len(model) else (missing, unexpected)
    kinds = {"missing keys": missing, "unexpected keys": unexpected, "shapes differ": shapes}
    return [f"{kind} ({len(found)}): {_listed(found)}" for kind, found in kinds.items() if found]


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
