"""The lens and what rests on it: the masked run against the model, attribution against patching."""

import json

import pytest
import torch
from conftest import RECALL, K, V, call, prepare, small

import train
from lab import lens
from lab.lens import Patch, Streams, all_edges, attribution, exact, masked_run, toward_answers
from model import Cells, Thinking


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
    options = ("--rows=500", "--biased=coke", "--bias=0.7")
    prepare(folder / "data", *options, script="data/deals/prepare.py")
    prepare(folder / "chains", "--modulus=3", "--levels=2", "--rows=2000")
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
    lens.main([f"--run={runs}/chain", "--rows=120"])
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
        done = call("lab/lens.py", *options.split(), "--rows=120")
        assert done.returncode == 1 and says in done.stderr, options
        assert done.stderr.count("\n") == 1
