"""Build the network with its initial weights: random, from another run, or from word vectors."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tinylm.data.chat import PreparedChat
from tinylm.data.prepared import PreparedData
from tinylm.model import lora, registry
from tinylm.model.base import Model
from tinylm.model.init_from import check_compatible, load_pretrained
from tinylm.pipeline.job import TrainingData, TrainingJob
from tinylm.processes import Processes
from tinylm.recipe import Recipe
from tinylm.reporting import Reporter
from tinylm.run import Run
from tinylm.tokenizer.vocab_editing import extension
from tinylm.training.out_of_memory import check_training_state


def open_pretrained(job: TrainingJob, processes: Processes, reporter: Reporter) -> Run | None:
    """Open the run that `model.init_from` refers to. Returns None if the key is not set, or if the resumed run has a checkpoint.

    Raises `InputError` if the path is not a run or its network is not compatible.
    """
    if job.resume and processes.run_on_main(lambda: bool(Run(job.folder).checkpoints())):
        return None

    def open_run() -> Run | None:
        section = job.recipe.model.pretrained
        if section is None:
            return None
        run = Run.open(os.path.expanduser(section.run))
        check_compatible(job.recipe.model, run.recipe.model)
        reporter.note(f"initializing from {run.path} {run.checkpoint().name}")
        return run

    return processes.run_on_main(open_run)


def build_network(
    job: TrainingJob, data: TrainingData, pretrained: Run | None, *, fresh: bool, processes: Processes, reporter: Reporter
) -> Model:
    """Build the network with initial weights and move it to the job's device. `fresh` means that no checkpoint will be restored."""
    check_training_state(job.recipe, data.prepared.tokenizer.vocab_size, job.device, processes.world_size)
    network = processes.run_on_all(lambda: _initialize_network(job.recipe, data.prepared, pretrained, reporter, fresh=fresh))
    network = network.to(job.device)
    network.recompute = job.recipe.training.activation_checkpointing
    network.compile_loss = job.recipe.training.compile is not False
    return network


def _initialize_network(
    recipe: Recipe, prepared: PreparedData, pretrained: Run | None, reporter: Reporter, *, fresh: bool
) -> Model:
    """Build a network with random or pretrained weights, and with LoRA matrices if the recipe has `training.lora`."""
    tokenizer = prepared.tokenizer
    network = registry.build(recipe.model, tokenizer.vocab_size, recipe.seed, objective=recipe.objective)
    if pretrained is not None:
        same_tokenizer = pretrained.tokenizer.fingerprint == tokenizer.fingerprint
        source = pretrained.network(pretrained.checkpoint(), torch.device("cpu"))
        extended = None if same_tokenizer else extension(pretrained.tokenizer, tokenizer)
        sources = None if extended is None else extended.sources
        reinitialized = load_pretrained(network, source, same_tokenizer=same_tokenizer, sources=sources)
        if sources is not None:
            added = tokenizer.vocab_size - pretrained.tokenizer.vocab_size
            reporter.note(f"{added} control tokens added; each starts with the mean embedding of the tokens in its name")
        if reinitialized:
            reporter.note(f"initialized at random: {', '.join(reinitialized)}")
    if fresh and recipe.model.pretrained_embeddings is not None:  # a checkpoint would replace them
        _load_embeddings(network, prepared, reporter)
    if recipe.training.lora is not None:
        lora.attach(network, recipe.training.lora, recipe.seed)
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        if isinstance(prepared, PreparedChat):
            trained += lora.train_rows(network, prepared.encoder.added_ids)
        reporter.note(f"LoRA: training {trained:,} of {network.parameter_count():,} parameters")
    return network


def _load_embeddings(network: Model, prepared: PreparedData, reporter: Reporter) -> None:
    """Initialize the embedding from the vectors in `model.init_embeddings`."""
    from tinylm.embedding import formats
    from tinylm.embedding.init_from_vectors import initialize_from_vectors

    source, embedding = str(network.model.pretrained_embeddings), network.input_embedding()
    initialized = initialize_from_vectors(embedding, formats.read(Path(source)), prepared.tokenizer)
    averaged = " (averaged over the words that contain them)" if initialized.from_words else ""
    reporter.note(
        f"embeddings: {initialized.tokens:,} of {initialized.vocab_size:,} tokens initialized from {source}{averaged}, "
        f"{'trained further' if embedding.weight.requires_grad else 'frozen'}"
    )
