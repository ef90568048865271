# ---
# jupyter:
#   jupytext:
#     main_language: python
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A stored run, step by step
#
# A comparison leaves a run folder. This notebook loads the example run that comes with the repository, looks at its
# tables, draws a chart of its own, prunes the model at the best level, and loads the checkpoint again. It measures nothing
# anew and takes about a minute on a CPU.
#
# It needs the package (`pip install .` in a checkout), and runs in the checkout, in this folder or in its root.

# %%
import json
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from pruning_comparison import load_model, load_pruned, load_run, preview_model, prune, save_pruned, write_results

here = Path.cwd()
example = next(place / "docs" / "example" for place in (here, here.parent) if (place / "docs" / "example").is_dir())

# %% [markdown]
# ## Load
#
# Everything that was measured is in the folder's journal. `load_run` reads it, together with the manifest, and writes
# nothing.

# %%
run = load_run(example)
print(f"{run.model}: variants {', '.join(run.variants)}, {len(run.measurements)} measurements")
print(f"levels {run.manifest.spec['pruning_levels']}, begun {run.manifest.started}")

# %% [markdown]
# ## Tables
#
# Each table of the journal is a data frame. A *cell* is one variant, method, iteration and level.

# %%
run.cells[["variant", "method", "iteration", "level", "heads_pruned", "heads_total"]].head()

# %% [markdown]
# `heads` has the score of each head, and whether it stays. Here: how many of each layer's 8 heads are left at 40 %, on
# average over iterations.

# %%
at_40 = run.heads[run.heads["level"] == 40]
left = at_40.groupby(["variant", "iteration", "layer"])["kept"].sum().groupby(["variant", "layer"]).mean()
left.unstack("layer").round(1)

# %% [markdown]
# `replies` has what heads answered when they were asked to leave. A head may be asked again at a higher level.

# %%
run.replies.groupby(["level", "answer"]).size().unstack(fill_value=0)

# %% [markdown]
# ## Estimates
#
# `write_results` estimates everything from the journal, and writes tables, charts and report. It writes into the run folder,
# so this uses a copy.

# %%
folder = Path(tempfile.mkdtemp()) / "run"
folder.mkdir()
for name in ("journal.sqlite", "manifest.json"):
    shutil.copy(example / name, folder)
report = write_results(folder, save_outputs=False)
print(report)

# %% [markdown]
# `relative.csv` has every variant relative to the dense model, by pairs of the same iteration and document, with 95 %
# intervals.

# %%
relative = pd.read_csv(folder / "relative.csv")
kept = relative[relative["metric"] == "perplexity"].set_index(["variant", "level"])
kept[["estimate", "ci_low", "ci_high", "n"]].round(3)

# %% [markdown]
# The answer in words is in `results.json`.

# %%
answer = json.loads((folder / "results.json").read_text("utf-8"))["answer"]
print("\n".join(answer["sentences"]))

# %% [markdown]
# ## A chart of your own
#
# All of it is plain pandas. Perplexity relative to the dense model, as points with intervals:

# %%
figure, axes = plt.subplots(figsize=(6, 4))
for variant, rows in kept.groupby("variant"):
    levels = rows.index.get_level_values("level")
    below, above = rows["estimate"] - rows["ci_low"], rows["ci_high"] - rows["estimate"]
    axes.errorbar(levels, rows["estimate"], yerr=[below, above], marker="o", capsize=3, label=variant)
axes.axhline(1.05, color="grey", linestyle=":", label="5 % more than dense")
axes.set_xlabel("heads pruned (%)")
axes.set_ylabel("perplexity / dense perplexity")
axes.set_yscale("log")
axes.legend()
figure.savefig(folder / "mine.png")

# %% [markdown]
# ## Prune at the best level
#
# The best level is the highest at which it is known that perplexity rises by at most the tolerance, 5 % here.

# %%
optimal = pd.read_csv(folder / "optimal_levels.csv")
best = optimal.loc[optimal["highest_level"].idxmax()]
print(f"{best['variant']}, {best['method']}: {best['highest_level']:g} %")

# %% [markdown]
# `prune` makes a model at that level. It takes a model and a tokenizer as transformers loads them, and settings like those
# of a comparison, here the run's own. `pruning-comparison prune --from=RUN --best` does the same from the command line.

# %%
dense = preview_model(run.model)
model = load_model(dense, device="cpu").model
settings = run.manifest.spec
pruned = prune(
    model,
    dense.tokenizer,
    level=float(best["highest_level"]),
    method=str(best["method"]),
    variant=str(best["variant"]),
    calibration_tokens=settings["calibration_tokens"],
    score_tokens=settings["score_tokens"],
    seed=settings["seed"],
)
print(f"{model.num_parameters():,} parameters before, {pruned.num_parameters():,} after")

# %% [markdown]
# ## Load the checkpoint

# %%
save_pruned(pruned, dense.tokenizer, folder / "best")
loaded, tokenizer = load_pruned(folder / "best")
prompt = tokenizer("The people of the United States", return_tensors="pt")
print(tokenizer.decode(loaded.generate(**prompt, max_new_tokens=20)[0]))

# %% [markdown]
# The folder of the checkpoint has a card that says what was pruned and how. Without this package it loads with
# `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
