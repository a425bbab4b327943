"""The character model: its data, what it may see, what it measures."""

import math

import pytest
import torch
from esper_runtime.workload import ConfigError
from esper_runtime.workloads.chars import Config, Network, build, encoded, text, windows
from torch.nn.functional import cross_entropy

SMOKE = {"layers": 1, "width": 32, "heads": 2, "context": 16, "max_chars": 4_000, "epochs": 1, "batch_size": 8}


def test_the_text_is_python_s_own_and_the_vocabulary_is_made_from_it():
    whole = text()
    assert len(whole) > 400_000
    ids, vocabulary = encoded(whole)
    assert vocabulary == len(set(whole)) < 256
    characters = sorted(set(whole))
    assert "".join(characters[i] for i in ids[1000:1100].tolist()) == whole[1000:1100]


def test_windows_lie_side_by_side_and_share_the_text_s_memory():
    ids = torch.arange(50)
    found = windows(ids, 8)
    assert found.shape == (6, 9)
    assert torch.equal(found[2], torch.arange(16, 25)), "with the character that follows the last one"
    assert found.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()


def test_the_whole_data_takes_a_few_megabytes():
    workload = build({})
    both = {
        data.untyped_storage().data_ptr(): data.untyped_storage().nbytes()
        for data in (workload.train, workload.validation)
    }
    assert sum(both.values()) < 20e6


def test_held_out_text_is_the_end_and_no_part_of_what_is_trained_on():
    workload = build(SMOKE)
    ids, _ = encoded(text(SMOKE["max_chars"]))
    assert torch.equal(workload.train[0], ids[:17])
    assert torch.equal(workload.validation[0], ids[3600:3617])
    assert 16 * len(workload.train) + 1 <= 3600


def test_a_prediction_sees_nothing_of_what_comes_after_it():
    torch.manual_seed(0)
    network = Network(Config(layers=2, width=32, heads=2, context=12), vocabulary=20).eval()
    ids = torch.randint(0, 20, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 20
    before, after = network(ids), network(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7], after[0, 7])


def test_an_untrained_model_knows_about_as_much_as_a_guess():
    torch.manual_seed(0)
    workload = build(SMOKE)
    _, vocabulary = encoded(text(SMOKE["max_chars"]))
    with torch.no_grad():
        loss = float(workload.loss(workload.model, workload.train[:8]))
    assert loss == pytest.approx(math.log(vocabulary), rel=0.1)


def test_metrics_agree_with_the_loss_and_count_characters():
    torch.manual_seed(0)
    workload = build(SMOKE)
    workload.model.eval()
    batch = workload.validation[:4]
    with torch.no_grad():
        measured, loss = workload.metrics(workload.model, batch), float(workload.loss(workload.model, batch))
    bits, count = measured["bits_per_char"]
    assert count == 4 * 16
    assert bits / count == pytest.approx(loss / math.log(2), rel=1e-5)
    right, count = measured["accuracy"]
    by_hand = sum(int(workload.model(row[None, :-1]).argmax(-1).eq(row[1:]).sum()) for row in batch)
    assert (right, count) == (by_hand, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_group_and_only_matrices_are_decayed(tied: bool):
    workload = build({**SMOKE, "tied": tied})
    decayed, plain = workload.parameter_groups(workload.model)
    assert {id(p) for p in workload.model.parameters()} == {id(p) for p in decayed["params"] + plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(workload.model.parameters()))
    assert {p.ndim for p in decayed["params"]} == {2}
    assert plain["weight_decay"] == 0.0
    assert (workload.model.head.weight is workload.model.characters.weight) is tied


def test_a_few_steps_on_one_batch_learn_it():
    torch.manual_seed(0)
    workload = build({**SMOKE, "learning_rate": 0.01})
    optimizer = workload.optimizer(list(workload.parameter_groups(workload.model)))
    losses = []
    for _ in range(40):
        loss = workload.loss(workload.model, workload.train[:8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_dropout_acts_in_training_alone():
    workload = build({**SMOKE, "dropout": 0.5})
    batch = workload.train[:4]
    with torch.no_grad():
        assert float(workload.loss(workload.model, batch)) != float(workload.loss(workload.model, batch))
        workload.model.eval()
        assert float(workload.loss(workload.model, batch)) == float(workload.loss(workload.model, batch))


def test_the_loss_is_the_plain_mean():
    torch.manual_seed(0)
    workload = build(SMOKE)
    batch = workload.train[:4]
    with torch.no_grad():
        scores = workload.model(batch[:, :-1])
        expected = cross_entropy(scores.reshape(64, -1), batch[:, 1:].reshape(64))
        assert float(workload.loss(workload.model, batch)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 30, "heads": 4}, "width is 30, no multiple of heads, 4"),
        ({"layers": 0}, "layers is 0; give at least 1"),
        ({"max_chars": 100, "context": 64}, "raise runtime.config.max_chars"),
        ({"layer": 2}, "runtime.config.layer is unknown"),
    ],
)
def test_bad_config_is_refused_with_the_remedy(change: dict[str, int], words: str):
    with pytest.raises((ValueError, ConfigError), match=words):
        build({**SMOKE, **change})
