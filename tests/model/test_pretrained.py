"""Encoders in folders: what was saved comes back; anything else is refused in words."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import pretrained
from model.encoder import APTEncoder
from pipeline.errors import ConfigError


def test_a_saved_encoder_comes_back_the_same(make_tiles, make_encoder, tmp_path):
    encoder, batch = make_encoder(), make_tiles().pack()
    encoder.save_pretrained(tmp_path / "new" / "encoder")
    again = APTEncoder.from_pretrained(tmp_path / "new" / "encoder")
    assert again.config == encoder.config
    assert torch.equal(again(batch).tokens, encoder(batch).tokens)
    names = sorted(path.name for path in (tmp_path / "new" / "encoder").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_the_folder_can_be_read_without_aptile(make_encoder, tmp_path):
    encoder = make_encoder()
    digest = "0123456789abcdef"
    encoder.config = encoder.config.model_copy(update={"data_digest": digest})
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["encoder"]
    assert (config["data_digest"], config["width"]) == (digest, 64)
    assert config["modalities"][0]["name"] == "image"
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == encoder.state_dict().keys()


def test_saving_again_replaces(make_encoder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    make_encoder(seed=0).save_pretrained(tmp_path)
    second = make_encoder(seed=1)
    second.save_pretrained(tmp_path)
    again = APTEncoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], w) for name, w in second.state_dict().items())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_weights_of_fewer_bits_come_back_in_float32(make_encoder, tmp_path):
    encoder = make_encoder().to(torch.bfloat16)
    encoder.save_pretrained(tmp_path)
    again = APTEncoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[n], w.float()) for n, w in encoder.state_dict().items())


def test_a_subclass_comes_back_as_itself(make_encoder, tmp_path):
    class Mine(APTEncoder):
        pass

    make_encoder().save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine


def test_an_encoder_of_uniform_tokens_is_one_of_adaptive_tokens_and_back(
    make_tiles, make_encoder, tmp_path
):
    """Thresholds of minus infinity are all that makes it uniform: no weight is of one kind only."""
    uniform, adaptive = (make_tiles(split_share=share).pack() for share in (1.0, 0.5))
    assert not uniform.scales.any()
    assert adaptive.scales.any()
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path)
    again = APTEncoder.from_pretrained(tmp_path)
    fixed_loss = again(adaptive).tokens.square().mean()
    fixed_loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())
    encoder.load_state_dict(again.state_dict())
    assert torch.equal(encoder(uniform).tokens, again(uniform).tokens)


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def drop_config(folder):
    (folder / "config.json").unlink()


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def flip_a_bit(folder):
    """In a weight, where safetensors sees nothing wrong."""
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)


def foreign_weights(folder):
    save_file({"something": torch.zeros(3)}, folder / "model.safetensors")


def foreign_weights_under_their_own_name(folder):
    foreign_weights(folder)
    found = pretrained._sha256(folder / "model.safetensors")
    change(folder, lambda saved: saved | {"weights_sha256": found})


def config_of_another_size(folder):
    change(folder, lambda saved: saved | {"encoder": saved["encoder"] | {"width": 128}})


def config_not_json(folder):
    (folder / "config.json").write_text("width: 64")


def config_of_another_library(folder):
    (folder / "config.json").write_text('{"architectures": ["ViTModel"], "hidden_size": 768}')


def config_of_the_future(folder):
    change(folder, lambda saved: saved | {"format": "aptile encoder 2"})


def unknown_key(folder):
    change(folder, lambda saved: saved | {"encoder": saved["encoder"] | {"breadth": 3}})


def weights_are_a_folder(folder):
    drop_weights(folder)
    (folder / "model.safetensors").mkdir()


def change(folder, how):
    config = folder / "config.json"
    config.write_text(json.dumps(how(json.loads(config.read_text()))))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_weights, "model.safetensors cannot be read"),
        (drop_config, "it has no config.json, which is written last"),
        (cut_weights, "model.safetensors is damaged or of another encoder: its SHA-256 is"),
        (flip_a_bit, "model.safetensors is damaged"),
        (foreign_weights, "model.safetensors is damaged or of another encoder"),
        (foreign_weights_under_their_own_name, "weights are not of its configuration"),
        (config_of_another_size, "weights are not of its configuration"),
        (config_not_json, "config.json is not an encoder's"),
        (config_of_another_library, "config.json is not an encoder's"),
        (config_of_the_future, "aptile encoder 1"),
        (unknown_key, "breadth"),
        (weights_are_a_folder, "model.safetensors cannot be read"),
    ],
)
def test_a_broken_folder_is_refused_in_words(damage, words, make_encoder, tmp_path):
    make_encoder().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match="not a saved encoder") as refused:
        APTEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert words in str(refused.value)


class DiskFullError(OSError):
    pass


@pytest.mark.parametrize("replaced", [0, 1], ids=["before any", "after the weights"])
@pytest.mark.parametrize("earlier", [False, True], ids=["new folder", "over another encoder"])
def test_saving_that_breaks_off_leaves_no_mixture(
    replaced, earlier, make_encoder, tmp_path, monkeypatch
):
    """What can be loaded afterwards is the encoder that was there before, or nothing."""
    before, after = make_encoder(seed=0), make_encoder(seed=1)
    if earlier:
        before.save_pretrained(tmp_path)
    move, moved = type(tmp_path).replace, []

    def fail_in_between(path, target):
        if len(moved) == replaced:
            raise DiskFullError
        moved.append(path)
        return move(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", fail_in_between)
    with pytest.raises(DiskFullError):
        after.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    if earlier and not replaced:
        again = APTEncoder.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(again[n], w) for n, w in before.state_dict().items())
    else:
        with pytest.raises(ConfigError, match="not a saved encoder"):
            APTEncoder.from_pretrained(tmp_path)
