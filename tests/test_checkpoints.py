"""Checkpoints: published wrappings, our own files, and everything that can be wrong with a file."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import restore_kernels
from restore_nets import create_model, list_models, load_checkpoint, load_model, save_checkpoint
from restore_nets.checkpoints import load_task
from restore_nets.tasks import create_task

OPTIONS: dict[str, Any] = {"dim": 4, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 1, 1), "mefc": False}
CONFIG = {"name": "drsformer", **OPTIONS}
FILES = ("model.pth", "model.safetensors")


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(**CONFIG)


def write(path: Path, content: Any) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def is_same(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def refusal(model: nn.Module, path: Path, **options: Any) -> str:
    """The message with which a file is refused: one line that names it; the model is as it was."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        load_checkpoint(model, path, **options)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    return message


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: x for name, x in state.items()}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_loads_a_plain_state_dict(tmp_path, file, prefix):
    source, model = small(1), small(2)
    load_checkpoint(model, write(tmp_path / file, prefixed(source.state_dict(), prefix)))
    assert is_same(model, source)


@pytest.mark.parametrize("wrapping", ["params", "params_ema", "state_dict", "model"])
def test_loads_the_published_wrappings(tmp_path, wrapping):
    source, model = small(1), small(2)
    content = {wrapping: prefixed(source.state_dict(), "module."), "epoch": 3, "optimizer": {"lr": 0.1}}
    load_checkpoint(model, str(write(tmp_path / "model.pth", content)))
    assert is_same(model, source)


def test_prefers_averaged_weights(tmp_path):
    source, model = small(1), small(2)
    content = {"params": small(3).state_dict(), "params_ema": source.state_dict()}
    load_checkpoint(model, write(tmp_path / "model.pth", content))
    assert is_same(model, source)


def test_keeps_dtype_of_the_model(tmp_path):
    model = small(2).double()
    load_checkpoint(model, write(tmp_path / "model.pth", small(1).state_dict()))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert is_same(model, small(1).double())


@pytest.mark.parametrize("file", FILES)
def test_mismatch_names_keys_and_shapes(tmp_path, file):
    state = small(1).state_dict()
    state["head.weight"] = state.pop("output.weight")
    state["patch_embed.proj.weight"] = torch.zeros(6, 3, 3, 3)
    message = refusal(small(2), write(tmp_path / file, state))
    assert message.endswith(
        "does not fit DRSformer: missing keys (1): output.weight; unexpected keys (1): head.weight; "
        "shapes differ (1): patch_embed.proj.weight (expected (4, 3, 3, 3), got (6, 3, 3, 3))"
    )


def test_long_lists_are_cut(tmp_path):
    message = refusal(small(2), write(tmp_path / "model.pth", prefixed(small(1).state_dict(), "net.")))
    count = len(small(1).state_dict())
    assert f"missing keys ({count}): patch_embed.proj.weight, " in message
    assert f" and {count - 5} more; unexpected keys ({count}): net.patch_embed.proj.weight, " in message
    assert len(message) < 1000


def test_not_strict_loads_what_both_have(tmp_path):
    source, model = small(1), small(2)
    state = source.state_dict()
    del state["output.weight"]
    state["head.weight"] = torch.zeros(1)
    kept = model.output.weight.clone()
    load_checkpoint(model, write(tmp_path / "model.pth", state), strict=False)
    assert torch.equal(model.output.weight, kept)
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_not_strict_refuses_other_shapes_and_other_models(tmp_path):
    state = small(1).state_dict()
    state["output.weight"] = torch.zeros(1)
    message = refusal(small(2), write(tmp_path / "a.pth", state), strict=False)
    assert message.endswith("shapes differ (1): output.weight (expected (3, 8, 3, 3), got (1,))")
    message = refusal(small(2), write(tmp_path / "b.pth", {"x": torch.zeros(1)}), strict=False)
    assert "missing keys" in message and "unexpected keys (1): x" in message


class Opens:
    """Unpickled without care, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_checkpoint_does_not_run(tmp_path):
    path = write(tmp_path / "model.pth", {"params": Opens(tmp_path / "ran")})
    assert f"holds more than tensors ({os.system.__module__}.system)" in refusal(small(2), path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickle_does_not_run(tmp_path, protocol, recwarn):
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(Opens(tmp_path / "ran"), protocol))
    refusal(small(2), path)
    assert not (tmp_path / "ran").exists()
    assert not recwarn.list


def test_other_python_objects_are_refused(tmp_path):
    content = {"params": small(1).state_dict(), "args": argparse.Namespace(lr=1)}
    message = refusal(small(2), write(tmp_path / "model.pth", content))
    assert "holds more than tensors (argparse.Namespace)" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold tensors by name; it holds one list"),
        (torch.zeros(2), "must hold tensors by name; it holds one Tensor"),
        ({}, "must hold tensors by name; it is empty"),
        ({"params": {}}, "must hold tensors by name; it is empty"),
        (
            {"epoch": 3, "lr": 0.1},
            "in one of params_ema, params, state_dict, model; epoch, lr are something else",
        ),
        ({"params": {"output.weight": 1.0}}, "output.weight is something else"),
        ({"output.weight": torch.zeros(2, dtype=torch.int64)}, "output.weight is something else"),
        ({"output.weight": torch.eye(2).to_sparse()}, "output.weight is something else"),
        ({3: torch.zeros(2)}, "3 is something else"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_other_things(tmp_path, content, message):
    assert message in refusal(small(2), write(tmp_path / "model.pth", content))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, 0.999])
def test_truncated_file(tmp_path, file, kept):
    path = write(tmp_path / file, small(1).state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    assert "is not a readable" in refusal(small(2), path)


@pytest.mark.parametrize("file", FILES)
def test_file_of_another_kind(tmp_path, file):
    (tmp_path / file).write_text("<!DOCTYPE html><html>not found</html>")
    assert "is not a readable" in refusal(small(2), tmp_path / file)


@pytest.mark.parametrize("load", [lambda path: load_checkpoint(small(2), path), load_model])
@pytest.mark.parametrize("file", FILES)
def test_missing_file_and_folder(tmp_path, file, load):
    with pytest.raises(FileNotFoundError, match=file):
        load(tmp_path / file)
    (tmp_path / file).mkdir()
    with pytest.raises(IsADirectoryError, match=file):
        load(tmp_path / file)


@pytest.mark.parametrize("name", ["drsformer", "ddsa"])
def test_our_files_rebuild_the_network(tmp_path, name):
    config = {**CONFIG, "name": name}
    if name == "ddsa":
        del config["mefc"]
        config["topk_ratio"] = 0.25
    source = create_model(**config)
    save_checkpoint(source, tmp_path / "model.safetensors", config)
    model = load_model(tmp_path / "model.safetensors")
    assert type(model) is type(source) and is_same(model, source) and not model.training
    x = torch.rand(1, 3, 9, 8)
    with restore_kernels.use_backend("eager"), torch.no_grad():
        assert torch.equal(model(x), source.eval()(x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_saves_channels_last_and_wrapped_models(tmp_path):
    source = small(1)
    wrapped = nn.DataParallel(source.to(memory_format=torch.channels_last))
    save_checkpoint(wrapped, tmp_path / "model.safetensors", CONFIG)
    assert is_same(load_model(tmp_path / "model.safetensors"), source)


def test_published_file_with_name_and_options(tmp_path):
    source = small(1)
    path = write(tmp_path / "model.pth", {"params": source.state_dict()})
    assert is_same(load_model(path, **CONFIG), source)
    names = ", ".join(list_models())
    with pytest.raises(ValueError, match=f"does not say which network it is for; name one of {names}"):
        load_model(path)
    with pytest.raises(TypeError, match=r"name must be given with options \(dim\); got None"):
        load_model(path, dim=4)
    with pytest.raises(ValueError, match="does not fit DRSformer"):
        load_model(path, "drsformer", **{**OPTIONS, "dim": 8})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "does not say which network it is for"),
        ({"model": "{"}, r"must describe its network as JSON with a name; got '\{'"),
        ({"model": '["ddsa"]'}, "must describe its network as JSON with a name"),
        ({"model": '{"dim": 4}'}, "must describe its network as JSON with a name"),
        ({"model": '{"name": "unet"}'}, "describes a network that cannot be made: name must be one of"),
        ({"model": '{"name": "ddsa", "dim": "4"}'}, "cannot be made: dim must be an integer; got '4'"),
    ],
)
def test_metadata_that_describes_no_network(tmp_path, metadata, message):
    path = tmp_path / "model.safetensors"
    save_file(small(1).state_dict(), path, metadata=metadata)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("file", "config", "error", "message"),
    [
        ("model.pth", CONFIG, ValueError, "path must end in .safetensors; got .*model.pth"),
        ("model.safetensors", OPTIONS, ValueError, "config must have the entry 'name'; got dim, "),
        (
            "model.safetensors",
            {**CONFIG, "dim": 8},
            ValueError,
            "config does not describe this model: shapes",
        ),
        ("model.safetensors", {**CONFIG, "lr": 8}, TypeError, "drsformer has the options .*; got 'lr'"),
        ("none/model.safetensors", CONFIG, FileNotFoundError, "the folder .*none does not exist"),
    ],
)
def test_save_refuses(tmp_path, file, config, error, message):
    with pytest.raises(error, match=message):
        save_checkpoint(small(1), tmp_path / file, config)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_checkpoint(small(1), path, CONFIG)

    def fails(state, temporary, metadata):
        Path(temporary).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(small(2), path, CONFIG)
    assert is_same(load_model(path), small(1))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_others_may_read_what_is_saved(tmp_path):
    before = os.umask(0o022)
    try:
        save_checkpoint(small(1), tmp_path / "model.safetensors", CONFIG)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_task_of_our_files(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(small(1), path, CONFIG, create_task("denoise", sigma=50).config())
    assert load_task(path) == create_task("denoise", sigma=50)
    save_checkpoint(small(1), path, CONFIG)
    assert load_task(path) is None
    assert load_task(write(tmp_path / "published.pth", small(1).state_dict())) is None


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no json", "must describe its task as JSON with a name; got 'no json'"),
        ('{"sigma": 3}', "must describe its task as JSON with a name"),
        ('{"name": "fly"}', "describes a task that cannot be made: task must be one of derain"),
        ('{"name": "sr", "scale": 9}', "describes a task that cannot be made: scale must be one of 2, 3, 4"),
    ],
)
def test_metadata_that_describes_no_task(tmp_path, task, message):
    path = tmp_path / "model.safetensors"
    save_file(small(1).state_dict(), path, metadata={"task": task})
    with pytest.raises(ValueError, match=message) as raised:
        load_task(path)
    assert str(path) in str(raised.value)


def test_metadata_is_the_config(tmp_path):
    from safetensors import safe_open

    save_checkpoint(small(1), tmp_path / "model.safetensors", CONFIG)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["model"]) == json.loads(json.dumps(CONFIG))
