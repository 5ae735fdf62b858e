"""Files that earlier scripts wrote stay readable, and mean the same weights and losses."""

import hashlib
from pathlib import Path

import pytest
import torch

import train_gpt

OLD = Path(__file__).with_name("old")
# Of a toy model, written and read by the script of 23 November 2026, before the settings in SINCE:
# the sha256 of its restored weights, and a mean loss.
ARTIFACTS = {"2026-11-23.int6.ptz": (
    "4842a3d1565bb08142e20517c997a03e18fcf81411c92a736dd942468b5ede82", 5.072216778993607)}


def reopened(path):
    header, tensors = train_gpt.read_tensors(path, "artifact")
    config = train_gpt.load_config({"STAGE": "evaluate", "DEVICE": "cpu"})
    return header, tensors, train_gpt.adopt(config, header, "evaluate", path)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_old_artifact_means_the_same_weights_and_losses(name):
    digest, loss = ARTIFACTS[name]
    header, tensors, config = reopened(OLD / name)
    weights = train_gpt.restore_weights(header, tensors, config, name)
    found = hashlib.sha256()
    for key in sorted(weights):
        found.update(key.encode() + weights[key].numpy().tobytes())
    assert found.hexdigest() == digest
    model = train_gpt.GPT(config)
    model.load_state_dict(weights)
    layout = train_gpt.phases(config)[train_gpt.phase_of(header, config, name)].layout
    windows = (torch.arange(18).view(2, 9) * 7 + 3) % 29
    with torch.no_grad():
        losses = model.token_losses(train_gpt.Batch.of_windows(windows), layout)
    assert losses.double().mean().item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_an_old_file_does_not_say_is_what_was_done_then(name):
    header, _, config = reopened(OLD / name)
    missing = set(train_gpt.SINCE) - set(header["config"])
    assert missing, "the file is older than these settings"
    assert all(getattr(config, setting) == train_gpt.SINCE[setting] for setting in missing)
    asked = train_gpt.load_config({"STAGE": "evaluate", "LANE_ROUTING": "learned"})
    with pytest.raises(train_gpt.ConfigError, match="LANE_ROUTING=learned: .*made with scalar"):
        train_gpt.adopt(asked, header, "evaluate", OLD / name)


def test_every_setting_that_files_may_lack_is_one_that_travels():
    assert set(train_gpt.SINCE) <= set(train_gpt.ARTIFACT_KNOBS)
