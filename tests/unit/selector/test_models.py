"""Laws of every model behind the selector: symmetry, order of rows, seeds, its file, later arms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig, check_config
from simmerge_ray.base.errors import ConfigError, LabelError, SelectorError
from simmerge_ray.selector.data.encoding import TaskEncoding
from simmerge_ray.selector.data.orders import by_order
from simmerge_ray.selector.data.targets import TrainingSet, level_and_contrasts
from simmerge_ray.selector.models import fit_mlp
from simmerge_ray.selector.models.fit_sklearn import fit_forest
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.models.train import train_selector
from tests.unit.selector.made_up import planted

OF_TASK = {"s": (1.0, 2.0), "t": (3.0, 2.5)}


@pytest.fixture(params=["mlp", "ridge", "knn", "forest"])
def config(request):
    return TrainConfig(model=request.param, num_members=2, num_epochs=60, num_trees=8)


@pytest.fixture
def dataset():
    whole = planted(5)
    noise = 0.2 * np.random.default_rng(1).normal(size=whole.features.shape)
    return dataclasses.replace(whole, features=whole.features + noise)


def test_contrasts_sum_to_zero_over_the_reference_arms(config, dataset):
    selector = train_selector(dataset, config, reference=("linear", "ties"))
    utility, _ = selector.predict(dataset.features)
    level = utility[:, [0, 2]].mean(1)
    alone = dataclasses.replace(dataset, arms=("linear", "ties"), utilities=dataset.utilities[:, [0, 2]])
    # A later arm changes nothing for the others: level and contrasts are those of a selector that never saw it.
    of_two, _ = train_selector(alone, config).predict(dataset.features)
    if config.model != "mlp":  # its arms share the encoder
        np.testing.assert_allclose(utility[:, [0, 2]], of_two, atol=1e-9)
        np.testing.assert_allclose(level, of_two.mean(1), atol=1e-9)
    else:
        heads = [network.contrast for network in selector.fitted.predictor.members]
        for weight, bias in heads:
            np.testing.assert_allclose(weight[:, [0, 2]].sum(1), 0.0, atol=1e-12)
            assert abs(bias[[0, 2]].sum()) < 1e-12


def test_later_arms_are_learned_from_the_rows_that_have_them(config, dataset):
    utilities = dataset.utilities.copy()
    utilities[::2, 1] = np.nan
    utilities[1::2, 1] = utilities[1::2][:, [0, 2]].mean(1) + 0.25
    utilities[3, 0] = np.nan
    partial = dataclasses.replace(dataset, utilities=utilities)
    selector = train_selector(partial, config, reference=("linear", "ties"))
    assert selector.provenance["num_contexts"] == len(dataset.contexts) - 1
    utility, sd = selector.predict(dataset.features)
    assert np.isfinite(utility).all() and np.isfinite(sd).all()
    contrast = utility[:, 1] - utility[:, [0, 2]].mean(1)
    assert abs(contrast.mean() - 0.25) < 0.05 and contrast.std() < 0.1


def test_both_orders_of_a_pair_give_one_prediction(config, dataset):
    selector = train_selector(dataset, config)
    for one, two in zip(selector.predict(dataset.features), selector.predict(dataset.features[:, ::-1]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_the_order_of_the_contexts_changes_nothing(config, dataset):
    order = np.random.default_rng(0).permutation(len(dataset.contexts)).tolist()
    one, other = (train_selector(rows, config) for rows in (dataset, dataset.subset(order)))
    np.testing.assert_array_equal(one.predict(dataset.features)[0], other.predict(dataset.features)[0])
    assert one.override == other.override and one.novelty.limit == other.novelty.limit
    assert one.provenance["data_digest"] == other.provenance["data_digest"]


def test_the_same_seed_gives_the_same_selector(config, dataset):
    one = train_selector(dataset, config).predict(dataset.features)[0]
    fit_mlp._recent.clear()  # trained again, not remembered
    same = train_selector(dataset, config).predict(dataset.features)[0]
    np.testing.assert_array_equal(one, same)
    if config.model in ("mlp", "forest"):
        other = train_selector(dataset, config.model_copy(update={"seed": 1})).predict(dataset.features)[0]
        assert not np.allclose(one, other)


@pytest.mark.parametrize("encoding", ["none", "onehot", "probe_stats"])
def test_the_artifact_predicts_and_chooses_the_same(config, dataset, encoding, tmp_path):
    tasks = [context.task for context in dataset.contexts]
    statistics = np.array([OF_TASK[task] for task in tasks])
    dataset = dataclasses.replace(dataset, statistics=statistics)
    selector = train_selector(dataset, config.model_copy(update={"task_encoding": encoding}))
    selector.write(tmp_path / "selector")
    again = read_selector(tmp_path / "selector")
    for one, two in zip(
        selector.predict(dataset.features, tasks, statistics),
        again.predict(dataset.features, tasks, statistics),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    assert (again.override, again.fitted.encoding) == (selector.override, selector.fitted.encoding)
    assert again.choose(dataset.features[:2], tasks[:2], statistics[:2]) == selector.choose(
        dataset.features[:2], tasks[:2], statistics[:2]
    )
    if selector.intervals:
        np.testing.assert_array_equal(again.half_widths(0.9), selector.half_widths(0.9))
    assert sorted(path.name for path in (tmp_path / "selector").iterdir()) == ["selector.json", "selector.safetensors"]


def test_a_model_whose_tensors_are_cut_is_damaged(config, dataset, tmp_path):
    from safetensors.numpy import load_file, save_file

    train_selector(dataset, config).write(tmp_path / "selector")
    path = tmp_path / "selector" / "selector.safetensors"
    tensors = load_file(path)
    largest = max((name for name in tensors if name.startswith("model.")), key=lambda name: tensors[name].size)
    save_file({**tensors, largest: tensors[largest][:-1].copy()}, path)
    with pytest.raises(SelectorError, match="damaged.*train it again"):
        read_selector(tmp_path / "selector")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SelectorError, match="damaged"):
        read_selector(tmp_path / "selector")


def test_no_contexts_have_no_predictions(config, dataset):
    utility, sd = train_selector(dataset, config).predict(np.zeros((0, 2, 6)))
    assert utility.shape == sd.shape == (0, 3)


def test_a_forest_is_evaluated_as_scikit_learn_does(dataset):
    from sklearn.ensemble import RandomForestRegressor

    level, contrasts = level_and_contrasts(dataset.utilities, (0, 1, 2))
    pairs = tuple((context.left, context.right) for context in dataset.contexts)
    one = TrainingSet(dataset.features, level, by_order(contrasts, False), (0, 1, 2), pairs)
    config = TrainConfig(num_trees=9)
    fitted = fit_forest(one, config)
    flat = dataset.features.reshape(-1, 6)
    settings = {"min_samples_leaf": 3, "max_features": 1 / 3, "random_state": 0}
    asked = np.concatenate([flat, 3 * np.random.default_rng(0).normal(size=(500, 6))])
    for trees, targets in ((fitted.level, level), (fitted.contrasts[0], contrasts)):
        forest = RandomForestRegressor(9, **settings).fit(flat, np.repeat(targets, 2, axis=0))
        mine = sum(trees.outputs(asked)) / 9
        np.testing.assert_array_equal(mine.reshape(forest.predict(asked).shape), forest.predict(asked))


def test_networks_do_not_depend_on_what_they_are_trained_beside(dataset):
    from simmerge_ray.selector.models.train import fit_models

    config = TrainConfig(num_members=2, num_epochs=40)
    everything = list(range(len(dataset.contexts)))
    alone = fit_models(dataset, [everything], config)[0]
    fit_mlp._recent.clear()
    beside = fit_models(dataset, [everything[4:], everything, everything[:9]], config)[1]
    np.testing.assert_array_equal(alone.predict(dataset.features)[0], beside.predict(dataset.features)[0])


def test_a_network_that_was_trained_on_the_same_data_is_not_trained_again(dataset, monkeypatch):
    from simmerge_ray.selector.models.train import fit_models

    config, everything = TrainConfig(num_members=2, num_epochs=5), list(range(len(dataset.contexts)))
    fit_mlp._recent.clear()
    fit_models(dataset, [everything], config)
    trained = []
    monkeypatch.setattr(fit_mlp, "_trained", lambda one, member, config: trained.append(member))
    fit_models(dataset, [everything[::-1]], config)  # in another order, which plays no part
    assert trained == []
    changed = dataclasses.replace(dataset, utilities=dataset.utilities + 1e-6)
    for data, parts, other in ((changed, everything, config), (dataset, everything[1:], config),
                               (dataset, everything, config.model_copy(update={"num_epochs": 6}))):  # fmt: skip
        with pytest.raises(AttributeError):  # it is to be trained, which is taken away here
            fit_models(data, [parts], other)[0].predict(dataset.features)
    assert sorted(trained) == [0, 0, 0, 1, 1, 1]
    fit_mlp._recent.clear()


def test_the_heads_of_a_network_are_linear_on_its_encoder(dataset):
    selector = train_selector(dataset, TrainConfig(num_members=2, num_epochs=5))
    predictor = selector.fitted.predictor
    encoded = predictor.encode(selector.fitted.inputs(dataset.features))
    assert encoded.shape == (len(dataset.contexts), 2, 2, 16)
    heads = [
        encoded.mean(1)[:, e] @ (m.level[0] + m.contrast[0]) + m.level[1] + m.contrast[1]
        for e, m in enumerate(predictor.members)
    ]
    np.testing.assert_allclose(np.mean(heads, axis=0), selector.predict(dataset.features)[0], rtol=1e-9)


def test_ridge_is_least_sure_far_from_its_data(dataset):
    selector = train_selector(dataset, TrainConfig(model="ridge"))
    near, far = (selector.predict(scale * dataset.features)[1].mean() for scale in (1.0, 10.0))
    assert far > 3 * near


def test_an_unknown_task_is_zeros_and_a_flag():
    encoding = TaskEncoding.fit("onehot", ["t", "s", "t"])
    np.testing.assert_array_equal(encoding.codes(3, ["s", "t", "u"]), [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(encoding.codes(1), [[0, 0, 1]])
    assert TaskEncoding.fit("none", ["s"]).codes(2).shape == (2, 0)


def test_an_encoding_learns_what_only_the_task_tells(dataset):
    tasks = [context.task for context in dataset.contexts]
    utilities = np.full(dataset.utilities.shape, 0.4)
    utilities[:, 0] += [0.3 if task == "s" else -0.3 for task in tasks]
    statistics = np.array([OF_TASK[task] for task in tasks])
    told = dataclasses.replace(dataset, utilities=utilities, statistics=statistics)
    for encoding in ("onehot", "probe_stats"):
        config = TrainConfig(model="ridge", penalties=(0.1,), task_encoding=encoding)
        utility, _ = train_selector(told, config).predict(dataset.features, tasks, statistics)
        np.testing.assert_allclose(utility, utilities, atol=0.05)


def test_bad_input_is_named_with_its_remedy(dataset):
    config = TrainConfig(model="knn")
    with pytest.raises(LabelError, match="unknown reference arm 'slerp'"):
        train_selector(dataset, config, reference=("slerp", "ties"))
    with pytest.raises(LabelError, match="with 1 arms are too few"):
        train_selector(dataset, config, reference=("ties",))
    features = dataset.features.copy()
    features[2, 0, 4] = np.nan
    with pytest.raises(LabelError, match="'weight_cosine_global' of c0 .* is missing; compute"):
        train_selector(dataclasses.replace(dataset, features=features), config)
    selector = train_selector(dataset, config)
    with pytest.raises(SelectorError, match="missing or not a finite"):
        selector.predict(features)
    with pytest.raises(SelectorError, match=r"takes \(N, 2, 6\)"):
        selector.predict(features[:, :, :3])
    with pytest.raises(SelectorError, match="1 tasks were given for 20 contexts"):
        selector.predict(dataset.features, ["s"])
    with pytest.raises(SelectorError, match="entropy and loss on the task of every context"):
        train_selector(dataset, TrainConfig(task_encoding="probe_stats"))
    with pytest.raises(SelectorError, match="one task at least"):
        selector.choose(dataset.features[:0])
    with pytest.raises(ConfigError, match="model"):
        check_config(TrainConfig, {"model": "oracle"}, "options")
    with pytest.raises(ConfigError, match="above 0"):
        check_config(TrainConfig, {"penalties": (0.0,)}, "options")
