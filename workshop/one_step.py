# %% [markdown]
# # One training step, by hand
#
# From a row of three operations to the gradient of one bit of one thought: fifteen minutes, every
# shape and every number in sight. At the end `train.py` has to agree with what was done by hand.
# B is 1 here; D = 64 numbers a cell, d = 8 bits a thought, V = 15 tokens. The network is untrained.

# %%
import sys
from pathlib import Path

ROOT = next(
    folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "model.py").exists()
)
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F

import model
import train
from workshop import kit

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False, linewidth=100)
trained, vocabulary, _ = kit.trained()
torch.manual_seed(1)
gpt = model.GPT(trained.config)
V = len(vocabulary.tokens)

# %% [markdown]
# ## 1. A row becomes numbers
# An operation is one token. The last token ends the row. Everything up to `=` is the prompt; the
# answer and the row's end count in the loss.

# %%
batch = kit.batch_of(["3+4*2+1=0"], vocabulary)
real = batch.real  # (1, T)
print("tokens", [vocabulary.tokens[i] for i in real[0]])
print("ids   ", real[0].tolist(), "shape", tuple(real.shape), "prompt", batch.prompt.item())

# %% [markdown]
# ## 2. The first cell thinks
# `3` goes through the network alone. Out come, for this cell, the logits of the next token (V), a
# gate, and h: one number a bit. A bit is the sign of tanh(h) plus a little noise; the noise is left
# out here, so that the numbers repeat.

# %%
x = [gpt.embed(real[:, 0])]  # embeddings of the cells so far, each (1, D)
out = gpt(torch.stack(x, dim=1))  # (1, 1, D) ->
print(
    "logits", tuple(out.logits.shape), "gate", tuple(out.gate.shape), "h", tuple(out.thoughts.shape)
)
h = out.thoughts[:, -1]  # (1, d)
print("h      ", h[0].detach())
print("tanh(h)", h[0].tanh().detach())
thought = gpt.thoughts.likeliest(h)  # (1,)
print("bits   ", gpt.thoughts.bits(thought)[0], "number", thought.item())

# %% [markdown]
# ## 3. The thought becomes the next input
# Its embedding is W z + b, linear in the bits z. The echo is added: all zeros, but with a gradient,
# as if the bits had been tanh(h).

# %%
embedding, echo = gpt.thoughts(thought), gpt.thoughts.echo(h)
print("embedding", tuple(embedding.shape), "largest echo", echo.abs().max().item())
assert not echo.any() and echo.requires_grad

# %% [markdown]
# ## 4. The whole row
# Token, thought, token, thought. Each time everything so far goes through the network again: slow,
# and plain. `inputs` and `chosen` are kept: what went in, and the h that each thought came from.

# %%
x, inputs, chosen, cells = [], [], [], []
for t in range(real.size(1) - 1):  # the row's end is predicted, never read
    x.append(gpt.embed(real[:, t]))
    h = gpt(torch.stack(x, dim=1)).thoughts[:, -1]
    h.retain_grad()
    thought = gpt.thoughts.likeliest(h)
    inputs.append(gpt.thoughts(thought) + gpt.thoughts.echo(h))
    inputs[-1].retain_grad()
    x.append(inputs[-1])
    chosen.append(h)
    cells += [vocabulary.tokens[real[0, t]], f"[{thought.item()}]"]
print(" ".join(cells))

# %% [markdown]
# ## 5. The loss
# Cross-entropy of the answer `0` and of the row's end: where they are emitted, which is behind a
# thought, and at the cell before, which goes on to think: four cells, their mean.

# %%
logits = gpt(torch.stack(x, dim=1)).logits[0]  # (C, V), C = 2 (T - 1)
first = 2 * (batch.prompt.item() - 1)  # the cell of `=`
target = real[0, [-2, -2, -1, -1]]
each = F.cross_entropy(logits[first:], target, reduction="none")  # (4,)
for cell, token, nats in zip(cells[first:], target, each):
    print(f"{cell:>6s} should say {vocabulary.tokens[token]!r:5s} and loses {nats:.3f} nats")
loss = each.mean()
print(f"loss {loss:.4f} nats; ln {V} is {torch.tensor(V).log():.4f}, what a guess loses")

# %% [markdown]
# ## 6. The gradient of one bit
# Take the thought behind `+4`. g is the gradient of the loss with respect to its embedding, (D,):
# it collects what every later cell that looks at it wants changed, later thoughts included. The
# echo carries it to h: the gradient of h_i is (1 - tanh(h_i)^2) times g W_i.

# %%
loss.backward()
place, W = 1, gpt.thoughts.embedding.weight.detach()  # W (D, d)
h, g = chosen[place].detach()[0], inputs[place].grad[0]
by_hand = (1 - h.tanh() ** 2) * (g @ W)  # (d,)
print("g W      ", g @ W)
print("by hand  ", by_hand)
print("autograd ", chosen[place].grad[0])
kit.same(by_hand, chosen[place].grad[0], "the gradient by hand")

# %% [markdown]
# ## 7. Is it true?
# The echo says how the loss would change if a bit moved a little. Bits do not move a little: flip
# each, and see what the loss really does. The echo's guess is the gradient times the step, from -1
# to 1 or back. It is biased; what learning needs is that its sign is mostly right.

# %%
bits, guess, really = gpt.thoughts.bits(gpt.thoughts.likeliest(h)), [], []
for i in range(len(h)):
    flipped = bits.clone()
    flipped[i] = -bits[i]
    changed = [a.detach() for a in x]
    changed[2 * place + 1] = gpt.thoughts.embedding(flipped)[None].detach()
    with torch.no_grad():
        new = gpt(torch.stack(changed, dim=1)).logits[0, first:]
    really.append(F.cross_entropy(new, target).item() - loss.item())
    guess.append((-2 * bits[i] * (g @ W)[i]).item())
print("the echo's guess       ", torch.tensor(guess) * 1000, "thousandths of a nat")
print("the loss, bit flipped  ", torch.tensor(really) * 1000, "later thoughts as they were")

# %% [markdown]
# ## 8. train.py agrees
# `rollout` does the same for a whole batch with a cache, `token_loss` takes the same mean.

# %%
ours = gpt.thoughts.head.weight.grad.clone()
gpt.zero_grad()
thinking = model.Thinking(greedy=True, force=1.0)
grid, out = train.rollout(gpt, real, batch.length, thinking)
theirs = train.token_loss(out.loss, grid, train.counted_tokens(batch), 1.0)
theirs.backward()
print(f"by hand {loss:.6f}, train.py {theirs:.6f}")
kit.same(theirs.detach(), loss.detach(), "the loss")
kit.same(gpt.thoughts.head.weight.grad, ours, "the gradient of the weights that choose the bits")

# %% [markdown]
# ## 9. The step
# Muon for the matrices of the block, AdamW for the rest. The same row again: it has got better.

# %%
for optimiser in gpt.optimisers(1e-3, 5e-3, 0.01):
    optimiser.step()
grid, out = train.rollout(gpt, real, batch.length, thinking)
after = train.token_loss(out.loss, grid, train.counted_tokens(batch), 1.0)
print(f"loss {loss:.4f} -> {after:.4f}")
assert after < loss
