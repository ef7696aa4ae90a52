"""The teaching studies: arms do what they say, budgets are equal, runs resume, and every learner trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import attent
from attent.demo.data import load
from benchmarks.studies import language, sentences, vision
from benchmarks.studies.arms import ARMS, FULL
from benchmarks.studies.costs import StudyCosts, measure
from benchmarks.studies.fit import fit
from benchmarks.studies.record import Results, code_version, read
from benchmarks.studies.study import TUNING_SEED, Learner, Metric, Study
from benchmarks.studies.sweep import Sweep
from benchmarks.studies.training import train
from benchmarks.studies.variants import variant

from .study_learners import BATCH, COSTS, known_costs, known_study, taught

N = 64
PASS = N // BATCH
#: Every second example has a loss ten times as high.
LEVELS = torch.where(torch.arange(N) % 2 == 0, 1.0, 10.0)
TEACHERS = ("random subset", "harvest", "paper, simple", "paper, complex")
TEXT = (torch.arange(120_000) * 7919 % 251 % 26 + 97).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------- budgets


def cost_of(arm: str, steps: int, details: dict[str, object]) -> float:
    """What a plan costs, in plain steps."""
    if arm in TEACHERS:
        return steps * (COSTS.plain if arm == "random subset" else COSTS.scored)
    if "pools" in details:
        pools = int(str(details["pools"]))
        return pools * (COSTS.by_loss if arm == "largest loss" else COSTS.pool) + steps - pools
    return steps * (COSTS.two_pass if arm == "selective backprop" else COSTS.plain)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("budget", [4.3 * PASS, 8.0 * PASS])
def test_every_arm_spends_its_budget_and_not_more(arm: str, budget: float) -> None:
    plan = ARMS[arm].plan(known_study(LEVELS), N, BATCH, COSTS, budget)
    spent = cost_of(arm, plan.steps, plan.details)
    # What is left is less than a step, of teachers less than a batch in each of their epochs (which drop the last one).
    slack = 2.0 * int(plan.details.get("epochs", 1))
    assert budget - slack < spent <= budget


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_takes_the_steps_of_its_plan_a_batch_each(arm: str) -> None:
    plan, _, steps = taught(arm, LEVELS, 5.0 * PASS)
    assert len(steps) == plan.steps
    assert all(len(ids) == len(ids.unique()) == BATCH for _, ids in steps if arm != FULL)


def test_a_teacher_is_fitted_at_the_ratio_next_to_its_own() -> None:
    def make(epochs: int, stretch: float) -> attent.Teacher:
        return attent.Teacher(800, total_epochs=epochs, ratio=min(0.5 * stretch, 1.0))

    # 100 steps a pass: 1 + 1 full epochs and 4 at 0.5 are 4 passes.
    found = fit(make, 8, 400, largest=2.0)
    assert (found.epochs, found.steps) == (6, 400) and found.stretch == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match="takes more than one pass"):
        fit(make, 8, 50, largest=2.0)


# ---------------------------------------------------------------------------------------------------------------- arms


def passes_of(steps: list[tuple[float, Tensor]]) -> Tensor:
    """How often each example was trained on."""
    return torch.bincount(torch.cat([ids for _, ids in steps]), minlength=N)


def share_of_high(steps: list[tuple[float, Tensor]]) -> float:
    return float(torch.cat([ids for _, ids in steps]).remainder(2).double().mean())


def test_full_data_sees_every_example_once_a_pass() -> None:
    _, _, steps = taught(FULL, LEVELS, 5.0 * PASS)
    assert torch.equal(passes_of(steps), torch.full((N,), 5))


@pytest.mark.parametrize("arm", TEACHERS)
def test_teachers_begin_with_a_full_pass(arm: str) -> None:
    _, _, steps = taught(arm, LEVELS, 5.0 * PASS)
    assert torch.equal(passes_of(steps[:PASS]), torch.ones(N, dtype=torch.int64))


def test_scores_draw_the_harvest_and_not_the_random_subset() -> None:
    # Between the full pass at the start and that at the end.
    drawn = {arm: share_of_high(taught(arm, LEVELS, 5.0 * PASS)[2][PASS:-PASS]) for arm in TEACHERS}
    # 24 batches of 8 uniform ones: 0.5 ± 0.04; by scores 10 : 1, half of all, of which a fifth is uniform: over 0.7.
    assert 0.38 < drawn["random subset"] < 0.62
    assert min(drawn["harvest"], drawn["paper, complex"]) > 0.62
    # The highest 70 %: all 32 high ones of 45 or so.
    assert drawn["paper, simple"] > 0.62


def pools_and_chosen(arm: str) -> list[tuple[Tensor, Tensor]]:
    """Of the steps that saw twice a batch: what they saw, and what they trained on."""
    _, learner, steps = taught(arm, LEVELS + torch.arange(N) / N, 6.0 * PASS)
    pools = [ids for ids in learner.asked if len(ids) == 2 * BATCH]
    trained = [ids for _, ids in steps]
    if arm != "selective backprop":
        warmup = PASS
        trained = trained[warmup : warmup + len(pools)]
    assert len(pools) == len(trained) > 5
    return list(zip(pools, trained, strict=True))


def test_largest_loss_takes_the_largest_of_a_pool() -> None:
    levels = LEVELS + torch.arange(N) / N
    for pool, chosen in pools_and_chosen("largest loss"):
        assert set(chosen.tolist()) == set(pool[levels[pool].topk(BATCH).indices].tolist())


@pytest.mark.parametrize("arm", ["one-pass", "selective backprop"])
def test_one_pass_and_selective_backprop_draw_from_the_pool_and_favour_the_high(arm: str) -> None:
    found = pools_and_chosen(arm)
    assert all(set(chosen.tolist()) <= set(pool.tolist()) for pool, chosen in found)
    high = torch.cat([chosen for _, chosen in found]).remainder(2).double().mean()
    # 160 and more draws; a uniform one has 0.5 ± 0.03.
    assert float(high) > 0.6


def test_pools_come_between_a_full_pass_and_the_last_eighth() -> None:
    plan, _, steps = taught("one-pass", LEVELS, 6.0 * PASS)
    assert plan.details["warmup"] == PASS
    assert torch.equal(passes_of(steps[:PASS]), torch.ones(N, dtype=torch.int64))
    in_full_at_the_end = plan.steps - PASS - plan.details["pools"]
    assert in_full_at_the_end == pytest.approx(plan.steps / 8, abs=2)


def test_info_batch_leaves_out_half_of_the_low_and_doubles_the_rest() -> None:
    plan, _, steps = taught("InfoBatch", LEVELS, 8.0 * PASS)
    annealed = plan.steps - plan.steps // 8
    low, high = passes_of(steps[PASS:annealed])[::2].double(), passes_of(steps[PASS:annealed])[1::2].double()
    # Binomial: each of 32 low ones is in half of some 8 passes: a mean share of 0.5 ± 0.03.
    assert float(low.mean() / high.mean()) == pytest.approx(0.5, abs=0.12)
    for number, (loss, ids) in enumerate(steps):
        weight = torch.where(LEVELS[ids] == 1, 2.0, 1.0) if PASS <= number < annealed else torch.ones(BATCH)
        assert loss == pytest.approx(float((weight * LEVELS[ids]).mean()))
    assert torch.equal(passes_of(steps[annealed:])[:N].clamp(max=1), passes_of(steps[annealed:])[:N])


# ------------------------------------------------------------------------------------------------------------- variants


def test_variants_are_what_their_names_say() -> None:
    labels = torch.arange(1000) % 10
    plain, duplicated = (variant(name, labels, 10, 500) for name in ("plain", "duplicated"))
    assert torch.equal(plain[0], torch.arange(500)) and torch.equal(plain[1], labels[:500])
    times = duplicated[0].bincount()
    assert len(duplicated[0]) == 500 and int(times[times > 1].sum()) == 350 and int((times > 1).sum()) == 50
    assert torch.equal(duplicated[1], labels[duplicated[0]])
    tail = variant("long tail", torch.arange(10_000) % 10, 10, 2000)[1].bincount(minlength=10)
    assert int(tail.sum()) == pytest.approx(2000, abs=5) and bool((tail.diff() < 0).all())
    assert int(tail[0]) == pytest.approx(50 * int(tail[9]), abs=25)  # half an example of the last class
    wrong = variant("mislabelled 30", labels, 10, 500)[1] != labels[:500]
    assert int(wrong.sum()) == 150
    with pytest.raises(ValueError, match="takes 'plain'"):
        variant("upside down", labels, 10, 500)


# --------------------------------------------------------------------------------------------------------------- sweeps


def known_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch, study: Study | None = None) -> Sweep:
    monkeypatch.setattr("benchmarks.studies.sweep.measure", lambda _: known_costs())
    few = {name: ARMS[name] for name in (FULL, "harvest")}
    monkeypatch.setattr("benchmarks.studies.sweep.ARMS", few)
    return Sweep(study or known_study(LEVELS[:32], passes=8.0), folder, budgets=(0.5, 1.0))


def test_a_sweep_tunes_every_arm_then_runs_budgets_and_seeds_at_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_sweep(tmp_path, monkeypatch).run()
    records = list(read(tmp_path / "known.jsonl"))
    runs = [record for record in records if record["kind"] == "run"]
    assert records[0]["kind"] == "costs" and len(runs) == 2 * (4 + 2) + 2 * 2 * 3
    for arm in (FULL, "harvest"):
        tuned: dict[tuple[int, float], list[float]] = {}
        for run in (run for run in runs if run["arm"] == arm and run["seed"] == TUNING_SEED):
            tuned.setdefault((run["batch_size"], run["learning_rate"]), []).append(run["value"])
        assert all(value > 50 for values in tuned.values() for value in values)  # the validation part
        twice = {point: values for point, values in tuned.items() if len(values) == 2}
        assert len(twice) == 2
        assert min(values[0] for values in twice.values()) >= max(v[0] for v in tuned.values() if len(v) == 1)
        swept = [run for run in runs if run["arm"] == arm and run["seed"] != TUNING_SEED]
        best = max(twice, key=lambda point: sum(twice[point]))
        assert {(run["batch_size"], run["learning_rate"]) for run in swept} == {best}
        assert all(run["value"] < 50 for run in swept)  # the test part


def test_a_sweep_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "known.jsonl"
    known_sweep(tmp_path, monkeypatch).run()
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:12]) + "\n" + whole[12][:40])
    known_sweep(tmp_path, monkeypatch).run()
    again = list(read(path))
    assert again[:12] == [json.loads(line) for line in whole[:12]]
    assert [record["key"] for record in again] == [json.loads(line)["key"] for line in whole]
    # The runs are functions of seed and plan: the values are the same.
    values = [record.get("value") for record in again]
    assert values == [json.loads(line).get("value") for line in whole]


def test_other_settings_are_other_runs_and_a_margin_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_sweep(tmp_path, monkeypatch).run()
    lines = len((tmp_path / "known.jsonl").read_text().splitlines())
    known_sweep(tmp_path, monkeypatch).run()
    assert len((tmp_path / "known.jsonl").read_text().splitlines()) == lines
    known_sweep(tmp_path, monkeypatch, known_study(LEVELS[:32], passes=9.0)).run()
    assert len((tmp_path / "known.jsonl").read_text().splitlines()) == 2 * lines


def module_of(source: str, folder: Path, name: str) -> ModuleType:
    import importlib.util

    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("studied", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_of_code_is_what_it_does_and_not_how_it_reads(tmp_path: Path) -> None:
    plain = module_of("def f(x):\n    return x + 1\n", tmp_path, "plain")
    words = module_of('"""Doc."""\n\n\ndef f(x):\n    """Adds."""\n    # one\n    return x+1\n', tmp_path, "words")
    other = module_of("def f(x):\n    return x + 2\n", tmp_path, "other")
    assert code_version([plain]) == code_version([words]) != code_version([other])


def test_results_are_on_disk_when_append_returns(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "x.jsonl")
    results.append({"kind": "run", "key": "a"})
    assert Results(results.path).find("run", "a") == {"kind": "run", "key": "a"}
    assert Results(results.path).find("costs", "a") is None


def test_a_budget_that_pays_for_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="pays for no step"):
        train(known_study(LEVELS, passes=0.01), known_costs(), FULL, BATCH, 1e-3, 0.5, 0)


# -------------------------------------------------------------------------------------------------------- real learners


def trains(study: Study, arms: tuple[str, ...] = (FULL, "harvest", "one-pass", "selective backprop")) -> None:
    """Each kind of step runs, and training changes what is trained."""
    costs = StudyCosts(0.01, dict.fromkeys(study.batch_sizes, COSTS))
    batch_size, rate = study.batch_sizes[-1], study.learning_rates[-1]
    made: list[Learner] = []

    def make(seed: int) -> Learner:
        made.append(study.make(seed))
        return made[-1]

    watched = replace(study, make=make)
    torch.manual_seed(0)
    before = [parameter.detach().clone() for parameter in study.make(0).parameters()]
    for arm in arms:
        outcome = train(watched, costs, arm, batch_size, rate, 1.0, 0)
        assert outcome["examples"] == outcome["steps"] * batch_size
        assert outcome["teaching_seconds"] >= 0 and outcome["seconds"] > 0
        assert outcome["value"] == made[-1].evaluate("test")
        assert not any(map(torch.equal, before, made[-1].parameters()))


def tiny(name: str, score: str, higher: bool, make: object, code: ModuleType) -> Study:
    return Study(
        name,
        name,
        score,
        Metric("metric", higher, 0.5),
        (4, 8),
        (1e-3, 1e-2),
        4.0,
        make,
        (code,),  # type: ignore[arg-type]
    )


def test_costs_are_ratios_to_a_plain_step_and_pools_go_to_the_cheaper_engine() -> None:
    study = known_study(LEVELS)
    costs = measure(study, seconds_to_spend=0.0)
    assert set(costs.by_batch) == set(study.batch_sizes) and costs.by_batch[BATCH].plain == 1.0
    # An eager engine that cuts the backward of one multiplication cannot win.
    assert all(of.engine == "two_pass" and of.start == 0 for of in costs.by_batch.values())
    assert all(of.scored >= of.plain and of.pool >= of.by_loss for of in costs.by_batch.values())
    assert StudyCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs


@pytest.mark.parametrize("masked", [False, True])
def test_learners_of_images_train(masked: bool) -> None:
    sizes = vision.Sizes(train=32, validation=16, test=16, width=8, depth=1, heads=2, patch=7)
    data = vision.Data(load(), sizes, "cpu")

    def make(seed: int) -> object:
        return vision.MaskedAutoencoder(data, sizes, seed) if masked else vision.VisionTransformer(data, sizes)

    trains(tiny("images", "residual" if masked else "logit", not masked, make, vision))


def test_parts_of_the_images_do_not_overlap() -> None:
    images = load()
    sizes = vision.Sizes(train=5000, validation=1000, test=6000, width=8, depth=1, heads=2, patch=7)
    data = vision.Data(images, sizes, "cpu")
    assert torch.equal(data.images, images.train_images[:5000])
    assert torch.equal(data.parts["test"][0][:2000], images.test_images)
    assert torch.equal(data.parts["test"][0][2000:], images.train_images[5000:9000])
    assert torch.equal(data.parts["validation"][1], images.train_labels[9000:])
    with pytest.raises(ValueError, match="training images wanted"):
        vision.Data(images, vision.Sizes(5001, 1000, 6000, 8, 1, 2, 7), "cpu")


def test_a_masked_autoencoder_sees_no_masked_patch() -> None:
    sizes = vision.Sizes(train=8, validation=4, test=4, width=8, depth=1, heads=2, patch=7)
    learner = vision.MaskedAutoencoder(vision.Data(load(), sizes, "cpu"), sizes, 0)
    images, order = learner.batch(torch.arange(4))
    predicted, _ = learner.masked_patches(images, order)
    patches = vision.patches(images, 7).clone()
    hidden = order[:, learner.visible :]
    patches.scatter_(1, hidden[..., None].expand(-1, -1, 49), 99.0)
    changed = patches.view(4, 4, 4, 7, 7).transpose(2, 3).reshape(4, 28, 28)
    assert torch.equal(learner.masked_patches(changed, order)[0], predicted)


def test_a_gpt_trains() -> None:
    sizes = language.Sizes(train=32, validation=8, test=8, length=16, width=8, depth=1, heads=2)
    data = language.Data(TEXT, sizes, "cpu")
    trains(tiny("gpt", "head", False, lambda seed: language.gpt(data, sizes, "cpu"), language))


def test_only_answers_have_a_loss() -> None:
    pairs = language.instructions(TEXT, 50, 48, torch.Generator().manual_seed(0))
    lengths = set()
    for tokens, targets in zip(pairs.tokens.tolist(), pairs.targets.tolist(), strict=True):
        asked, _, _ = bytes(tokens).partition(b"=")
        answer = bytes(t for t in targets if t != language.IGNORED)
        assert answer.endswith(b"\n") and targets[: len(asked)] == [language.IGNORED] * len(asked)
        if asked.startswith(b"capitals: "):
            assert answer == answer.upper()
        lengths.add(len(answer))
    assert min(lengths) < 9 < 18 < max(lengths)


@pytest.mark.slow
def test_lora_on_a_gpt_trains_the_same_start_and_leaves_it_alone() -> None:
    pytest.importorskip("peft")
    sizes = language.Sizes(32, 8, 8, 48, width=8, depth=1, heads=2, pretraining=(20, 4), rank=2)
    data = language.Data(TEXT, sizes, "cpu")
    first = language.with_lora(data, sizes, "cpu")
    trains(tiny("gpt-lora", "head", False, lambda seed: language.with_lora(data, sizes, "cpu"), language))
    again = language.with_lora(data, sizes, "cpu")
    assert not first.head.weight.requires_grad and torch.equal(first.head.weight, again.head.weight)
    assert all("lora" in name for name, value in again.model.named_parameters() if value.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_sentence_encoder_is_fine_tuned_from_its_upper_layers(tmp_path: Path, rank: int) -> None:
    transformers = pytest.importorskip("transformers")
    if rank:
        pytest.importorskip("peft")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    texts = [" ".join(chr(97 + (i * j) % 26) for j in range(60)) for i in range(1, 29)]
    sizes = sentences.Sizes(train=32, validation=16, test=64, length=8, periods=4, rank=rank)
    data = sentences.Data(str(tmp_path), texts, sizes, "cpu")
    trains(
        tiny("minilm", "logit", True, lambda seed: sentences.SentenceClassifier(data, sizes, "cpu"), sentences),
        arms=(FULL, "harvest"),
    )
