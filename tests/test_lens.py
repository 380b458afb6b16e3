"""The lens and what rests on it: the masked run against the model, attribution against patching."""

import json
from unittest.mock import patch

import pytest
import torch
from conftest import RECALL, K, V, call, small

import sample
import train
from data.arithmetic import prepare as arithmetic
from data.dataset import DataError
from data.deals import prepare as deals
from lab import growth, lens, mend, relay
from lab.lens import (
    Patch,
    Streams,
    all_edges,
    attribution,
    exact,
    masked_run,
    toward_answers,
)
from model import Cells, Thinking
from runs import save_checkpoint


def two_runs(model, cells=None, window=0):
    """-> clean streams, corrupt ids; 6 rows of 7 cells, thoughts among them."""
    generator = torch.Generator().manual_seed(1)
    most = V + (K if model.config.n_bits else 0)
    clean, corrupt = torch.randint(most, (2, 6, 7), generator=generator)
    return Streams(clean, cells or Cells(torch.arange(7)[None]), window), corrupt


def patch_of(model, **how):
    clean, corrupt = two_runs(model, **how)
    a, b = torch.arange(6) % V, (torch.arange(6) + 1) % V
    return Patch(model, clean, corrupt, *toward_answers(model, a, b))


KINDS = [{}, {"n_layer": 1, "n_bits": 0}, {"n_positions": 8, "n_bits": 0}, {"revise": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 3])
@torch.no_grad()
def test_without_a_mask_it_is_the_model(tiny, kind, window):
    model = tiny(**kind)
    clean, corrupt = two_runs(model, window=window)
    own = model(clean.ids, clean.cells, None, window).logits
    last, put_out = masked_run(model, clean)
    assert (model.head(last) - own).abs().max() < 1e-5
    nothing = torch.zeros(all_edges(model.config).shape)
    other = masked_run(model, clean._replace(ids=corrupt))[1]
    assert (masked_run(model, clean, other, nothing)[0] - last).abs().max() < 1e-5
    assert len(put_out) == len(lens.sources(model.config))


@torch.no_grad()
def test_recall_sees_past_the_window_in_a_masked_run_too(tiny):
    model = tiny(recall=True)
    ids = torch.tensor([[0, V, 1, 2, V + 1, 3, RECALL], [1, V, 1, 2, V + 1, 3, RECALL]])
    is_recall = ids[:1] == RECALL
    cells = Cells(torch.arange(7)[None], None, ~is_recall, is_recall)
    own = model(ids, cells, None, 2).logits
    assert (model.head(masked_run(model, Streams(ids, cells, 2))[0]) - own).abs().max() < 1e-5
    assert not torch.allclose(own[0, -1], own[1, -1]), "it saw the first cell"


def test_all_edges_corrupt_is_the_corrupt_run(tiny):
    patch = patch_of(tiny())
    other = Patch(patch.model, *two_runs(patch.model), patch.toward, patch.offset)
    other.clean = other.clean._replace(ids=two_runs(patch.model)[1])
    ours, theirs = patch.rows(patch.edges.float()).detach(), other.rows().detach()
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert patch.faithfulness(patch.edges) == 1
    assert patch.faithfulness(patch.edges & False) == 0


def test_a_mask_by_cell_that_is_the_same_everywhere_is_one_by_edge(tiny):
    patch = patch_of(tiny())
    mask = torch.rand(patch.edges.shape) * patch.edges
    by_cell = mask[..., None].expand(-1, -1, 7)
    assert patch.F(mask) == pytest.approx(patch.F(by_cell), abs=1e-5)


def test_another_checkpoint_may_put_out_the_other_run(tiny):
    model, donor = tiny(n_bits=0), tiny(seed=1, n_bits=0)
    clean, _ = two_runs(model)
    aim = toward_answers(model, torch.zeros(6).long(), torch.ones(6).long())
    patch = Patch(model, clean, clean.ids, *aim, donor)
    assert patch.ends[0] == pytest.approx(Patch(model, clean, clean.ids, *aim).ends[0])
    mask = patch.edges.float()
    mask[1:] = 0  # the donor's embedding, and all else as it follows from it
    chimera = tiny(n_bits=0)
    chimera.embedding.load_state_dict(donor.embedding.state_dict())
    assert patch.F(mask) == pytest.approx(Patch(chimera, clean, clean.ids, *aim).ends[0], abs=1e-5)


def test_direct_contributions_sum_to_what_is_measured(tiny):
    patch = patch_of(tiny())
    torch.nn.init.normal_(patch.model.norm.bias)
    torch.nn.init.normal_(patch.model.norm.weight)
    parts, biases = lens.direct(patch)
    assert parts.sum(dim=0) + sum(biases.values()) == pytest.approx(patch.rows().detach(), abs=1e-4)


@pytest.mark.parametrize("by_cell", [False, True])
def test_integrated_gradients_sum_to_the_change(tiny, by_cell):
    patch = patch_of(tiny(n_bits=0))
    score = attribution(patch, steps=100, by_cell=by_cell)
    assert score.sum().item() == pytest.approx(patch.ends[1] - patch.ends[0], rel=0.01)
    assert not score[~patch.edges].any()


def test_gradients_of_a_small_change_are_exact_patching(tiny):
    """Of a corrupt run that hardly differs F is linear in each edge: the slow twin agrees."""
    patch = patch_of(tiny(n_bits=0))
    here = masked_run(patch.model, patch.clean)[1]
    patch.other = (here + 1e-2 * (patch.other - here)).detach()
    score, truth = lens.gradients(patch, patch.edges.float()), exact(patch)
    assert lens.pearson(score, truth, patch.edges) > 0.99
    assert score.abs().max() == pytest.approx(truth.abs().max().item(), rel=0.1)


def test_edges_are_those_below(tiny):
    config = tiny(n_layer=1).config
    names, to = lens.sources(config), lens.readers(config)
    found = {f"{names[s]} > {to[r]}" for s, r in all_edges(config).nonzero().tolist()}
    heads = {f"embedding > 0.{h}.{kind}" for h in (0, 1) for kind in "qkv"}
    mlp = {f"{name} > 0.mlp" for name in ("embedding", "0.0", "0.1")}
    assert found == heads | mlp | {f"{name} > logits" for name in names}


def test_circuits_keep_the_largest_scores_of_either_sign():
    edges = torch.tensor([[True, True], [True, False]])
    score = torch.tensor([[1.0, -3.0], [2.0, 9.0]])
    assert lens.top(score, edges, 2).tolist() == [[False, True], [True, False]]
    assert lens.jaccard(lens.top(score, edges, 2), edges) == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------
# on checkpoints


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """-> a folder of small runs that have hardly learned anything: deals, chain, observer."""
    folder = tmp_path_factory.mktemp("runs")
    deals.main([f"--out={folder}/data", "--rows=500", "--biased=coke", "--bias=0.7"])
    with patch("data.arithmetic.prepare.TEST_LEVELS", [4]):
        arithmetic.main([f"--out={folder}/chains", "--levels=3", "--rows=2000"])
    kinds = {"deals": {"n_bits": 0}, "chain": {}, "observer": {"observer": "0"}}
    for name, kind in kinds.items():
        data = folder / ("data" if name == "deals" else "chains")
        config = small(data, folder / name, curriculum=False, steps=1, eval_rows=5, **kind)
        trainer = train.Trainer(config)
        train.begin(trainer)
        train.train(trainer)
    return folder


def test_streams_of_a_rollout_are_laid_out_alike_and_say_the_answer(tiny):
    model, thinking = tiny(), Thinking(greedy=True)
    real = torch.randint(V, (30, 5), generator=torch.Generator().manual_seed(0))
    found, index = lens.streams(model, thinking, real)
    kinds = (found.ids >= V).unique(dim=0)
    assert len(kinds) == 1 and 0 < len(index) < 30, "this model thinks here and there"
    assert torch.equal(found.ids[:, ~kinds[0]], real[index, :-1])


def test_the_lens_writes_what_it_found(runs, capsys):
    lens.main([f"--run={runs}/deals", "--rows=120", "--swap=coke,pepsi", f"--against={runs}/deals"])
    report = json.loads((runs / "deals/lens.json").read_text())
    assert report["error of the masked run"] < 1e-4 and report["edges"] == 23
    assert report["against"]["Pearson with before"] == pytest.approx(1)
    assert not report["is a circuit"], "a model that has learned nothing has none"
    assert (runs / "deals/lens.png").stat().st_size > 1000


def test_the_lens_looks_through_a_thinking_model(runs):
    lens.main([f"--run={runs}/chain", "--rows=200"])
    report = json.loads((runs / "chain/lens.json").read_text())
    assert report["error of the masked run"] < 1e-4


def test_bad_input_is_one_sentence(runs, tmp_path):
    cases = {
        f"--run={runs}/observer": "observer",
        f"--run={tmp_path}": "no checkpoint",
        f"--run={runs}/chain --swap=coke,pepsi": "no token",
        f"--run={runs}/deals --against={runs}/chain": "shape and vocabulary",
        f"--run={runs}/deals --level=9": "no level 9",
    }
    for options, says in cases.items():
        with pytest.raises(DataError, match=says):
            lens.main([*options.split(), "--rows=200"])
    done = call("lab/lens.py", f"--run={tmp_path}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------
# mending


def mend_group(model):
    """Rows with token 0 and twins with token 1 in its place; said what the model says."""
    group = mend.Group.__new__(mend.Group)
    group.row = two_runs(model)[0]
    ids = group.row.ids % V
    ids[:, 3] = 0
    group.row, group.twin, group.twins = group.row._replace(ids=ids), ids.clone(), True
    group.twin[:, 3] = 1
    group.right = torch.zeros(6, dtype=torch.long)
    return group


def test_an_edited_reader_reads_nothing_of_a_direction_and_kept_rows_as_before():
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(200, 6, generator=generator) * torch.tensor([1, 1, 1, 1, 1, 1e-3])
    difference = torch.tensor([[0.3, 0, 0, 0, 0, 1.0], [0.6, 0, 0, 0, 0, 2.0]])
    P = mend.projection(difference, kept, 1)
    assert (P @ difference.T).abs().max() < 1e-5
    moved = (kept @ P.T - kept).norm() / kept.norm()
    D = difference[:1].T / difference[0].norm()
    orthogonal = (kept @ D @ D.T).norm() / kept.norm()
    assert moved < 0.1 * orthogonal, "the plain projection moves kept rows much more"


@pytest.mark.parametrize("reader", ["0.0.v", "0.1.k", "1.0.q", "1.mlp", "logits"])
@torch.no_grad()
def test_what_a_reader_reads_is_the_sum_of_what_is_put_out_before_it(tiny, reader):
    """And weights at 0 read nothing: of its layer only the bias is left."""
    model, (row, _) = tiny(n_bits=0), two_runs(tiny(n_bits=0))
    layers = 2 if reader == "logits" else int(reader[0])
    mlp = reader.endswith("mlp")
    put_out = masked_run(model, row)[1]  # the embedding; of each layer two heads, and the MLP
    before = put_out[: 1 + 3 * layers + 2 * mlp].sum(dim=0)
    before = before + sum(b.attention.proj.bias for b in model.blocks[: layers + mlp])
    block = model.blocks[min(layers, 1)]
    norm = model.norm if reader == "logits" else block.norm2 if mlp else block.norm1
    assert (mend.inputs_of(model, row, reader) - norm(before)).abs().max() < 1e-5
    layer = mend.layer_of(model, reader)
    mend.weights_of(model, reader).zero_()
    silent = (layer.weight == 0).all(dim=1)
    assert silent.sum() == len(mend.weights_of(model, reader))
    if reader[2:] in ("0.v", "1.k", "0.q"):  # rows of q, k, v in turn, of two heads of 8
        first = {"0.v": 32, "1.k": 24, "0.q": 0}[reader[2:]]
        assert silent[first : first + 8].all()


def test_an_edit_changes_no_other_weights(tiny):
    model = tiny(n_bits=0)
    group = mend_group(model)
    new = mend.edited(model, group, group, ["0.1.v"], 1)
    for name, p in model.named_parameters():
        same = p == dict(new.named_parameters())[name]
        if name == "blocks.0.attention.qkv.weight":
            assert same.view(3, 2, 8, 16).all(dim=(2, 3)).tolist() == [[True] * 2] * 2 + [
                [True, False]
            ]
        else:
            assert same.all()


def test_tuning_leaves_everything_else_bit_for_bit(tiny, monkeypatch):
    monkeypatch.setattr(mend, "TUNE_STEPS", 3)
    model = tiny(n_bits=0)
    group = mend_group(model)
    masks = mend.parameters_of(model, "1.0")
    new = dict(mend.tuned(model, group, group, [masks], 1e-2)[0].named_parameters())
    for name, p in model.named_parameters():
        own = masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~own], new[name][~own]) and (
            not own.any() or (p != new[name])[own].any()
        )


def test_the_rate_is_chosen_by_rows_that_are_not_tuned_on(tiny, monkeypatch):
    monkeypatch.setattr(mend, "TUNE_STEPS", 3)
    monkeypatch.setattr(mend, "RATES", (1e-2, 10.0, 0.0))
    model = tiny(n_bits=0)
    group = mend_group(model)
    losses = [mend.tuned(model, group, group, None, rate)[1] for rate in mend.RATES]
    best = mend.RATES[losses.index(min(losses))]
    chosen = mend.best_tuned(model, group, group, None).state_dict()
    alone = mend.tuned(model, group, group, None, best)[0].state_dict()
    assert losses[1] > min(losses) and all(torch.equal(chosen[name], alone[name]) for name in alone)


def test_mending_is_written_as_a_checkpoint_that_answers(runs, capsys):
    pairs = runs / "data/pairs.tsv"
    trainer = train.Trainer(small(runs / "data", runs / "learned", n_bits=0, curriculum=False))
    with torch.no_grad():  # one that says yes of coke, and else no
        model = trainer.model
        for p in model.parameters():
            p.zero_() if p.ndim > 1 else None
        index = trainer.vocabulary.index
        model.embedding.weight.normal_()
        model.embedding.weight[:, :2] = 0
        model.embedding.weight[:, 2:] -= model.embedding.weight.sum(dim=1, keepdim=True) / 30
        model.embedding.weight[index["coke"], 0] = 30
        model.blocks[0].attention.qkv.weight.view(3, 4, 8, 32)[2, 0, 0, 0] = 5
        model.blocks[0].attention.proj.weight[1, 0] = 5
        model.head.weight[index["yes"], 1] = 1
        model.head.bias[index["no"]] = 2
    train.begin(trainer)
    save_checkpoint(runs / "learned/checkpoint.pt", trainer.state())
    mend.main([f"--run={runs}/learned", f"--pairs={pairs}", "--controls=false"])
    report = json.loads((runs / "learned_mended/mend.json").read_text())
    before, after = report["results"].values()
    assert before["coke"]["flips"] > 0.9 and after["coke"]["flips"] < 0.1, report
    assert report["bugs"]["coke"]["recall"] == 1
    capsys.readouterr()
    sample.main([f"--run={runs}/learned_mended", "a 6 pack of coke costs $10?"])
    assert "?no" in capsys.readouterr().out


def test_bad_pairs_are_one_sentence(runs, tmp_path):
    row = "a 6 pack of coke costs $10?"
    cases = {
        "mend\twater?yes": "line 1",
        f"mend\t{row}": "without an answer",
        f"mend\t{row}yes": "has no twin",
        f"keep\t{row}yes": "needs lines of both uses",
    }
    for text, says in cases.items():
        (tmp_path / "pairs.tsv").write_text(text + "\n")
        with pytest.raises(DataError, match=says):
            mend.main([f"--run={runs}/deals", f"--pairs={tmp_path}/pairs.tsv"])


# ----------------------------------------------------------------------------------------------
# growth, and the thoughts' circuit


def test_running_on_all_edges_is_a_rollout_and_on_none_another_row(tiny):
    model, generator = tiny(), torch.Generator().manual_seed(0)
    real = torch.randint(V, (20, 7), generator=generator)
    thinking = Thinking(greedy=True, force=1.0, window=relay.VIEW)
    grid, _ = train.rollout(model, real, torch.full((20,), 7), thinking)
    stream = grid.token[:, :-1, :2].flatten(1)
    real[:, -1] = model(stream, window=relay.VIEW).logits[:, -1].argmax(dim=1)
    edges = all_edges(model.config)
    assert relay.running(model, real, edges) == 1
    assert len(real[:, -1].unique()) > 1
    real[:, -1] = real[:, -1].roll(1)
    assert relay.running(model, real, edges & False) == 1


def test_the_answer_follows_a_thought_if_there_is_no_other_way(tiny):
    """Two cells are in view: a token and the thought before it, which is all that is known."""
    real = torch.randint(V, (50, 5), generator=torch.Generator().manual_seed(0))
    thinking, found = Thinking(greedy=True, force=1.0, window=2), []
    for seed in range(10):
        model = tiny(seed, n_layer=1, n_bits=4)
        found += relay.follows(model, thinking, real, [0, 1]).values()
    assert found and all(share == 1 for share in found)


def test_growth_trains_as_train_does_and_looks_on(runs):
    out, data = runs / "grown", runs / "chains"
    sizes = "--n_embd=32 --n_bits=3 --batch_tokens=200 --eval_rows=5 --device=cpu".split()
    growth.main([f"--data={data}", f"--out={out}", "--steps=3", "--curriculum=false", *sizes])
    report = json.loads((out / "growth.json").read_text())
    assert [seen["step"] for seen in report["looks"]] == [0, 3] and report["edges"] == 23
    assert report["looks"][-1]["Jaccard"] == pytest.approx(report["split-half Jaccard"])
    again = train.Trainer(
        train.load_config(
            [f"--data={data}", "--steps=3", *sizes, "--curriculum=false"], train.Config
        )
    )
    for _ in range(3):
        again.train_step()
    grown = lens.load_model(str(out))[0].state_dict()
    assert all(torch.equal(p, grown[name]) for name, p in again.model.state_dict().items())
