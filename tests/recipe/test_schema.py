"""Every key in a recipe survives a round trip through YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from keys import leaves, sections_of
from pydantic import ValidationError

from tinylm.recipe import Recipe, changes, load, loads
from tinylm.recipe.presets import DECODER_PRESETS
from tinylm.recipe.schema import MuonOptimizer, flattened

BASE = "data: {train: my.txt}\ntraining: {steps: 10}\n"

# The overrides that set each key. The last override sets the key to a non-default value.
_LLAMA3 = "model.rope_scaling={type: llama3, factor: 8, original_context: 64}"
_YARN = "model.rope_scaling={type: yarn, factor: 8, original_context: 64}"
_TRANSLATOR = "model={architecture: encoder_decoder}"
_RECURRENT = "model={architecture: recurrent_encoder_decoder}"
_PAIRS_DATA = "data={train: a.jsonl, format: pairs, heldout: {share: 0.1}}"
SETTINGS: dict[str, list[str]] = {
    "Recipe.name": ["name=other"],
    "Recipe.seed": ["seed=7"],
    "MixedSource.source": ["data.train=[{source: a.txt}, {source: [b.txt, c.txt]}]"],
    "MixedSource.weight": ["data.train=[{source: a.txt, weight: 2}, {source: b.txt, weight: [1, 0.5]}]"],
    "DataSection.field": ["data.field=body"],
    "DataSection.errors": ["data.errors=replace"],
    "DataSection.template": ["data.template='{title}: {body}'"],
    "DataSection.shuffle": ["data.shuffle=documents"],
    "DataSection.document_mask": ["data.document_mask=on"],
    "HeldoutShare.share": ["data.heldout.share=0.25"],
    "HeldoutShare.by": ["data.heldout.by=document"],
    "HeldoutSources.sources": ["data.heldout=held.txt"],
    "TestShare.share": ["data.test.share=0.05"],
    "BpeTokenizer.kind": ["tokenizer=char", "tokenizer=bpe"],
    "BpeTokenizer.vocab_size": ["tokenizer.vocab_size=999"],
    "BpeTokenizer.split": ["tokenizer.split=gpt2"],
    "BpeTokenizer.digits": ["tokenizer.digits=3"],
    "BpeTokenizer.max_megabytes": ["tokenizer.max_megabytes=7"],
    "BpeTokenizer.allow_smaller": ["tokenizer.allow_smaller=off"],
    "BpeTokenizer.min_frequency": ["tokenizer.min_frequency=2"],
    "BpeTokenizer.max_token_length": ["tokenizer.max_token_length=9"],
    "BpeTokenizer.alphabet": ["tokenizer.alphabet=text"],
    "BpeTokenizer.byte_fallback": ["tokenizer.alphabet=ACGT", "tokenizer.byte_fallback=off"],
    "BpeTokenizer.dropout": ["tokenizer.dropout=0.1"],
    "BpeTokenizer.normalize": ["tokenizer.normalize=[nfkc, lowercase]"],
    "BpeTokenizer.special_tokens": ['tokenizer.special_tokens=["<|user|>"]'],
    "BpeTokenizer.added_tokens": ["tokenizer.added_tokens=[self, cls]"],
    "UnigramTokenizer.kind": ["tokenizer.kind=unigram"],
    "UnigramTokenizer.allow_smaller": ["tokenizer=unigram", "tokenizer.allow_smaller=off"],
    "UnigramTokenizer.vocab_size": ["tokenizer=unigram", "tokenizer.vocab_size=999"],
    "UnigramTokenizer.max_megabytes": ["tokenizer=unigram", "tokenizer.max_megabytes=7"],
    "UnigramTokenizer.normalize": ["tokenizer=unigram", "tokenizer.normalize=nfc"],
    "UnigramTokenizer.special_tokens": ["tokenizer=unigram", 'tokenizer.special_tokens=["<|user|>"]'],
    "UnigramTokenizer.added_tokens": ["tokenizer=unigram", "tokenizer.added_tokens=[self]"],
    "UnigramTokenizer.split": ["tokenizer=unigram", "tokenizer.split=gpt2"],
    "UnigramTokenizer.digits": ["tokenizer=unigram", "tokenizer.digits=3"],
    "UnigramTokenizer.max_token_length": ["tokenizer=unigram", "tokenizer.max_token_length=9"],
    "UnigramTokenizer.alphabet": ["tokenizer=unigram", "tokenizer.alphabet=500"],
    "UnigramTokenizer.byte_fallback": ["tokenizer=unigram", "tokenizer.byte_fallback=off"],
    "WordPieceTokenizer.kind": ["tokenizer.kind=wordpiece"],
    "WordPieceTokenizer.allow_smaller": ["tokenizer=wordpiece", "tokenizer.allow_smaller=off"],
    "WordPieceTokenizer.vocab_size": ["tokenizer=wordpiece", "tokenizer.vocab_size=999"],
    "WordPieceTokenizer.max_megabytes": ["tokenizer=wordpiece", "tokenizer.max_megabytes=7"],
    "WordPieceTokenizer.normalize": ["tokenizer=wordpiece", "tokenizer.normalize=nfc"],
    "WordPieceTokenizer.special_tokens": ["tokenizer=wordpiece", 'tokenizer.special_tokens=["<|user|>"]'],
    "WordPieceTokenizer.added_tokens": ["tokenizer=wordpiece", "tokenizer.added_tokens=[self]"],
    "WordPieceTokenizer.split": ["tokenizer=wordpiece", "tokenizer.split=whitespace"],
    "WordPieceTokenizer.min_frequency": ["tokenizer=wordpiece", "tokenizer.min_frequency=2"],
    "WordPieceTokenizer.max_token_length": ["tokenizer=wordpiece", "tokenizer.max_token_length=9"],
    "WordPieceTokenizer.alphabet": ["tokenizer=wordpiece", "tokenizer.alphabet=500"],
    "WordTokenizer.kind": ["tokenizer.kind=word"],
    "WordTokenizer.allow_smaller": ["tokenizer=word", "tokenizer.allow_smaller=off"],
    "WordTokenizer.vocab_size": ["tokenizer=word", "tokenizer.vocab_size=999"],
    "WordTokenizer.max_megabytes": ["tokenizer=word", "tokenizer.max_megabytes=7"],
    "WordTokenizer.normalize": ["tokenizer=word", "tokenizer.normalize=nfc"],
    "WordTokenizer.special_tokens": ["tokenizer=word", 'tokenizer.special_tokens=["<|user|>"]'],
    "WordTokenizer.added_tokens": ["tokenizer=word", "tokenizer.added_tokens=[self]"],
    "WordTokenizer.split": ["tokenizer=word", "tokenizer.split=whitespace"],
    "WordTokenizer.min_frequency": ["tokenizer=word", "tokenizer.min_frequency=2"],
    "CharTokenizer.normalize": ["tokenizer=char", "tokenizer.normalize=nfc"],
    "CharTokenizer.special_tokens": ["tokenizer=char", 'tokenizer.special_tokens=["<|user|>"]'],
    "CharTokenizer.added_tokens": ["tokenizer=char", "tokenizer.added_tokens=[self]"],
    "CharTokenizer.min_frequency": ["tokenizer=char", "tokenizer.min_frequency=2"],
    "ByteTokenizer.normalize": ["tokenizer=byte", "tokenizer.normalize=nfc"],
    "ByteTokenizer.special_tokens": ["tokenizer=byte", 'tokenizer.special_tokens=["<|user|>"]'],
    "ByteTokenizer.added_tokens": ["tokenizer=byte", "tokenizer.added_tokens=[self]"],
    "CharTokenizer.kind": ["tokenizer.kind=char"],
    "ByteTokenizer.kind": ["tokenizer.kind=byte"],
    "FileTokenizer.kind": ["tokenizer={kind: file, path: a.json}"],
    "FileTokenizer.path": ["tokenizer={path: a.json}", "tokenizer.path=b.json"],
    "DecoderSection.preset": ["model.preset=llama"],
    "DecoderSection.n_layer": ["model.n_layer=3"],
    "DecoderSection.n_head": ["model.n_head=4"],
    "DecoderSection.n_kv_head": ["model.n_kv_head=2"],
    "DecoderSection.n_embd": ["model.n_embd=96"],
    "DecoderSection.context_length": ["model.context_length=31"],
    "DecoderSection.norm": ["model.norm=layernorm"],
    "DecoderSection.norm_position": ["model.norm_position=post"],
    "DecoderSection.norm_eps": ["model.norm_eps=1e-3"],
    "DecoderSection.norm_gain": ["model.norm_gain=off"],
    "DecoderSection.position": ["model.position=none"],
    "DecoderSection.rope_theta": ["model.rope_theta=5e5"],
    "DecoderSection.rope_theta_local": ["model.attention_window=64", "model.rope_theta_local=1e3"],
    "DecoderSection.rope_fraction": ["model.rope_fraction=0.25"],
    "DecoderSection.rope_pattern": ["model.rope_pattern=[rope, none]"],
    "LinearRopeScaling.type": ["model.rope_scaling={type: linear, factor: 2}"],
    "LinearRopeScaling.factor": ["model.rope_scaling={type: linear, factor: 2}", "model.rope_scaling.factor=3"],
    "Llama3RopeScaling.type": ["model.rope_scaling={type: llama3, factor: 8, original_context: 64}"],
    "Llama3RopeScaling.factor": [_LLAMA3, "model.rope_scaling.factor=3"],
    "Llama3RopeScaling.original_context": [_LLAMA3, "model.rope_scaling.original_context=32"],
    "Llama3RopeScaling.low_freq_factor": [_LLAMA3, "model.rope_scaling.low_freq_factor=2"],
    "Llama3RopeScaling.high_freq_factor": [_LLAMA3, "model.rope_scaling.high_freq_factor=8"],
    "YarnRopeScaling.type": ["model.rope_scaling={type: yarn, factor: 8, original_context: 64}"],
    "YarnRopeScaling.factor": [_YARN, "model.rope_scaling.factor=3"],
    "YarnRopeScaling.original_context": [_YARN, "model.rope_scaling.original_context=32"],
    "YarnRopeScaling.beta_fast": [_YARN, "model.rope_scaling.beta_fast=16"],
    "YarnRopeScaling.beta_slow": [_YARN, "model.rope_scaling.beta_slow=2"],
    "YarnRopeScaling.attention_factor": [_YARN, "model.rope_scaling.attention_factor=1.5"],
    "YarnRopeScaling.truncate": [_YARN, "model.rope_scaling.truncate=off"],
    "DecoderSection.feed_forward": ["model.feed_forward=swiglu"],
    "DecoderSection.feed_forward_multiple": ["model.feed_forward_multiple=3"],
    "DecoderSection.bias": ["model.bias=on"],
    "DecoderSection.tie_embeddings": ["model.tie_embeddings=on"],
    "DecoderSection.qk_norm": ["model.qk_norm=off"],
    "DecoderSection.qk_norm_joint": ["model.qk_norm_joint=on"],
    "DecoderSection.qk_gain": ["model.qk_gain=off"],
    "DecoderSection.shifted_key_heads": ["model.shifted_key_heads=1"],
    "DecoderSection.embedding_norm": ["model.embedding_norm=off"],
    "DecoderSection.zero_init_outputs": ["model.zero_init_outputs=off"],
    "DecoderSection.ngram_embeddings": ["model.ngram_embeddings=[2, 3]"],
    "DecoderSection.ngram_dropout": ["model.ngram_dropout=0.3"],
    "DecoderSection.ngram_rows": ["model.ngram_rows=500"],
    "DecoderSection.ngram_width": ["model.ngram_width=8"],
    "DecoderSection.value_embeddings": ["model.value_embeddings=1"],
    "DecoderSection.value_residual": ["model.value_residual=on"],
    "DecoderSection.embedding_shortcut": ["model.embedding_shortcut=on"],
    "DecoderSection.parallel_residual": ["model.parallel_residual=on"],
    "DecoderSection.dropout": ["model.dropout=0.1"],
    "DecoderSection.attention_dropout": ["model.attention_dropout=0.1"],
    "DecoderSection.head_bias": ["model.head_bias=on"],
    "DecoderSection.embedding_scale": ["model.embedding_scale=16"],
    "DecoderSection.attention_softcap": ["model.attention_softcap=50"],
    "DecoderSection.logit_softcap": ["model.logit_softcap=30"],
    "DecoderSection.init_embeddings": ["model.init_embeddings=v.bin"],
    "DecoderSection.freeze_embeddings": ["model.init_embeddings=v.bin", "model.freeze_embeddings=on"],
    "InitFrom.run": ["model.init_from=a", "model.init_from.run=b"],
    "InitFrom.head": ["model.init_from={run: a}", "model.init_from.head=off"],
    "DecoderSection.head_dim": ["model.head_dim=32"],
    "DecoderSection.attention_window": ["model.attention_window=100"],
    "DecoderSection.attention_pattern": ["model.attention_window=100", "model.attention_pattern=[local, global]"],
    "DecoderSection.n_inner": ["model.n_inner=100"],
    "LoraSection.rank": ["model.init_from=a", "training.lora={}", "training.lora.rank=4"],
    "LoraSection.alpha": ["model.init_from=a", "training.lora={}", "training.lora.alpha=32"],
    "LoraSection.targets": ["model.init_from=a", "training.lora={}", "training.lora.targets=[attention.qkv]"],
    "RnnSection.n_layer": ["model.architecture=rnn", "model.n_layer=3"],
    "RnnSection.n_embd": ["model.architecture=rnn", "model.n_embd=64"],
    "RnnSection.context_length": ["model.architecture=rnn", "model.context_length=64"],
    "RnnSection.burn_in": ["model.architecture=rnn", "model.burn_in=4"],
    "RnnSection.tie_embeddings": ["model.architecture=rnn", "model.tie_embeddings=on"],
    "RnnSection.dropout": ["model.architecture=rnn", "model.dropout=0.1"],
    "RnnSection.weight_drop": ["model.architecture=rnn", "model.weight_drop=0.3"],
    "RnnSection.activation": ["model.architecture=rnn", "model.activation=relu"],
    "LstmSection.n_layer": ["model.architecture=lstm", "model.n_layer=3"],
    "LstmSection.n_embd": ["model.architecture=lstm", "model.n_embd=64"],
    "LstmSection.context_length": ["model.architecture=lstm", "model.context_length=64"],
    "LstmSection.burn_in": ["model.architecture=lstm", "model.burn_in=4"],
    "LstmSection.tie_embeddings": ["model.architecture=lstm", "model.tie_embeddings=on"],
    "LstmSection.dropout": ["model.architecture=lstm", "model.dropout=0.1"],
    "LstmSection.weight_drop": ["model.architecture=lstm", "model.weight_drop=0.3"],
    "GruSection.n_layer": ["model.architecture=gru", "model.n_layer=3"],
    "GruSection.n_embd": ["model.architecture=gru", "model.n_embd=64"],
    "GruSection.context_length": ["model.architecture=gru", "model.context_length=64"],
    "GruSection.burn_in": ["model.architecture=gru", "model.burn_in=4"],
    "GruSection.tie_embeddings": ["model.architecture=gru", "model.tie_embeddings=on"],
    "GruSection.dropout": ["model.architecture=gru", "model.dropout=0.1"],
    "GruSection.weight_drop": ["model.architecture=gru", "model.weight_drop=0.3"],
    "FeedForwardSection.window": ["model.architecture=feed_forward", "model.window=8"],
    "FeedForwardSection.n_embd": ["model.architecture=feed_forward", "model.n_embd=16"],
    "FeedForwardSection.n_hidden": ["model.architecture=feed_forward", "model.n_hidden=64"],
    "FeedForwardSection.input": ["model.architecture=feed_forward", "model.input=one_hot"],
    "FeedForwardSection.direct": ["model.architecture=feed_forward", "model.direct=on"],
    "FeedForwardSection.dropout": ["model.architecture=feed_forward", "model.dropout=0.1"],
    "FeedForwardSection.context_length": ["model.architecture=feed_forward", "model.context_length=64"],
    "NgramSection.order": ["training={epochs: 1}", "model.architecture=ngram", "model.order=4"],
    "NgramSection.prune": ["training={epochs: 1}", "model.architecture=ngram", "model.prune=[0, 0, 1]"],
    "NgramSection.context_length": ["training={epochs: 1}", "model.architecture=ngram", "model.context_length=1000"],
    "TrainingSection.steps": ["training.steps=11"],
    "TrainingSection.tokens": ["training.tokens=1e6"],
    "TrainingSection.epochs": ["training.epochs=1.5"],
    "TrainingSection.minutes": ["training.minutes=0.5"],
    "TrainingSection.global_batch_size": ["training.global_batch_size=32"],
    "TrainingSection.micro_batch_size": ["training.micro_batch_size=16"],
    "TrainingSection.precision": ["training.precision=bf16"],
    "TrainingSection.clip_grad_norm": ["training.clip_grad_norm=off"],
    "TrainingSection.ema": ["training.ema=0.999"],
    "TrainingSection.compile": ["training.compile=model"],
    "TrainingSection.activation_checkpointing": ["training.activation_checkpointing=on"],
    "TrainingSection.parallel": ["training.parallel=fsdp"],
    "GuardsSection.patience": ["training.guards.patience=5"],
    "GuardsSection.rollbacks": ["training.guards.rollbacks=0"],
    "GuardsSection.spike": ["training.guards.spike=6"],
    "TrainingSection.log_every": ["training.log_every=3"],
    "AdamWOptimizer.name": ["training.optimizer=adamw"],
    "AdamWOptimizer.lr": ["training.optimizer=adamw", "training.optimizer.lr=3e-4"],
    "AdamWOptimizer.betas": ["training.optimizer=adamw", "training.optimizer.betas=[0.8, 0.9]"],
    "AdamWOptimizer.eps": ["training.optimizer=adamw", "training.optimizer.eps=1e-6"],
    "AdamWOptimizer.weight_decay": ["training.optimizer=adamw", "training.optimizer.weight_decay=0"],
    "MuonOptimizer.name": ["training.optimizer=adamw", "training.optimizer=muon"],
    "MuonOptimizer.lr": ["training.optimizer.lr=0.03"],
    "MuonOptimizer.momentum": ["training.optimizer.momentum=0.9"],
    "MuonOptimizer.momentum_warmup": ["training.optimizer.momentum_warmup=30"],
    "MuonOptimizer.orthogonalization": ["training.optimizer.orthogonalization=rational"],
    "MuonOptimizer.newton_schulz": ["training.optimizer.newton_schulz=classic"],
    "MuonOptimizer.newton_schulz_steps": ["training.optimizer.newton_schulz_steps=4"],
    "MuonOptimizer.newton_schulz_dtype": ["training.optimizer.newton_schulz_dtype=fp32"],
    "MuonOptimizer.weight_decay": ["training.optimizer.weight_decay=0.01"],
    "MuonOptimizer.cautious_weight_decay": ["training.optimizer.cautious_weight_decay=on"],
    "MuonOptimizer.adamw_lr": ["training.optimizer.adamw_lr=1e-3"],
    "MuonOptimizer.betas": ["training.optimizer.betas=[0.8, 0.9]"],
    "MuonOptimizer.eps": ["training.optimizer.eps=1e-6"],
    "WsdSchedule.name": ["training.schedule=cosine", "training.schedule=wsd"],
    "WsdSchedule.warmup": ["training.schedule.warmup=3"],
    "WsdSchedule.floor": ["training.schedule.floor=0.1"],
    "WsdSchedule.cooldown": ["training.schedule.cooldown=0.3"],
    "CosineSchedule.name": ["training.schedule=cosine"],
    "CosineSchedule.warmup": ["training.schedule=cosine", "training.schedule.warmup=0.1"],
    "CosineSchedule.floor": ["training.schedule=cosine", "training.schedule.floor=0.1"],
    "LinearSchedule.name": ["training.schedule=linear"],
    "LinearSchedule.warmup": ["training.schedule=linear", "training.schedule.warmup=5"],
    "LinearSchedule.floor": ["training.schedule=linear", "training.schedule.floor=0.1"],
    "ConstantSchedule.name": ["training.schedule=constant"],
    "ConstantSchedule.warmup": ["training.schedule=constant", "training.schedule.warmup=5"],
    "EvaluationSection.every": ["evaluation.every=7"],
    "EvaluationSection.patience": ["evaluation.patience=5"],
    "EvaluationSection.max_tokens": ["evaluation.max_tokens=5000"],
    "EvaluationSection.stride": ["evaluation.stride=8"],
    "CheckpointSection.every": ["checkpoint.every=7"],
    "CheckpointSection.keep": ["checkpoint.keep=0"],
    "CheckpointSection.keep_every": ["checkpoint.keep_every=0.25"],
    "CheckpointSection.mirror": ["checkpoint.mirror=s3://bucket/runs"],
    "CheckpointSection.on_failure": ["checkpoint.on_failure=continue"],
    "CheckpointSection.optimizer": ["checkpoint.optimizer=drop"],
    "SamplingSection.every": ["sampling.every=7"],
    "SamplingSection.prompts": ["sampling.every=7", "sampling.prompts=[one, two]"],
    "SamplingSection.max_new_tokens": ["sampling.every=7", "sampling.max_new_tokens=9"],
    "Recipe.tracking": ["tracking=[tensorboard, wandb]"],
    "SamplingSection.temperature": ["sampling.every=7", "sampling.temperature=0"],
    "SamplingSection.top_k": ["sampling.every=7", "sampling.top_k=null"],
}


_CHAT = "data={train: a.jsonl, format: chat}"
_PREFERENCES, _FROM_RUN = "data={train: a.jsonl, format: preferences}", "model.init_from=a"
_ENCODER, _LABELS = "model.architecture=encoder", "data={train: a.jsonl, format: labels}"
SETTINGS |= {
    "Encoder" + name.removeprefix("Decoder"): [_ENCODER, *settings]
    for name, settings in SETTINGS.items()
    if name.startswith("DecoderSection.")
}
SETTINGS |= {
    "EncoderSection.preset": [_ENCODER, "model.preset=bert"],
    "EncoderSection.norm_first_block": [_ENCODER, "model.norm_first_block=off"],
    "EncoderSection.token_types": [_ENCODER, "model.token_types=2"],
    "EncoderSection.head_transform": [_ENCODER, "model.head_transform=on"],
    "EncoderSection.head_bias": [_ENCODER, "model.head_bias=on"],
    "MaskedLMObjective.rate": [_ENCODER, "objective.rate=[0.3, 0.15]"],
    "Replacement.mask": [_ENCODER, "objective.replace={random: 0, keep: 0.5, mask: 0.5}"],
    "Replacement.random": [_ENCODER, "objective.replace={mask: 0.8, keep: 0, random: 0.2}"],
    "Replacement.keep": [_ENCODER, "objective.replace={mask: 0.8, random: 0, keep: 0.2}"],
    "CausalLMObjective.mask_prompt": [_CHAT, "objective.mask_prompt=off"],
    "CausalLMObjective.teacher": ["objective.teacher=[runs/a, runs/b]"],
    "CausalLMObjective.teacher_weight": ["objective.teacher=runs/a", "objective.teacher_weight=0.75"],
    "ChatSection.train": ["data={train: b.jsonl, format: chat}", "data.train=[a.csv, b.jsonl]"],
    "ChatSection.layout": [_CHAT, "data.layout=alpaca"],
    "ChatSection.messages": [_CHAT, "data.messages=chat"],
    "ChatSection.prompt": ["data={train: a.jsonl, format: chat, layout: prompt_response}", "data.prompt=question"],
    "ChatSection.response": ["data={train: a.jsonl, format: chat, layout: prompt_response}", "data.response=answer"],
    "ChatSection.packing": [_CHAT, "data.packing=off"],
    "ChatSection.errors": [_CHAT, "data.errors=replace"],
    "PreferencesSection.train": ["data={train: b.jsonl, format: preferences}", _FROM_RUN, "data.train=[a.jsonl, b.jsonl]"],
    "PreferencesSection.errors": [_PREFERENCES, _FROM_RUN, "data.errors=replace"],
    "DPOObjective.beta": [_PREFERENCES, _FROM_RUN, "objective.beta=0.5"],
    "ConversationShare.share": [_CHAT, "data.heldout.share=0.2"],
    "ConversationSources.sources": [_CHAT, "data.heldout=b.jsonl"],
    "MixSection.text": ["data={train: a.jsonl, format: chat, mix: {text: b.txt}}", "data.mix.text=a.txt"],
    "MixSection.share": ["data={train: a.jsonl, format: chat, mix: {text: b.txt}}", "data.mix.share=0.3"],
    "UnusedShare.share": ["data={train: a.jsonl, format: chat, mix: {text: b.txt}}", "data.mix.heldout.share=0.3"],
    "UnusedShare.by": ["data={train: a.jsonl, format: chat, mix: {text: b.txt}}", "data.mix.heldout.by=document"],
    "LabelsSection.train": ["data={train: b.jsonl, format: labels}", "data.train=[a.csv, b.jsonl]"],
    "LabelsSection.text": [_LABELS, "data.text=body"],
    "LabelsSection.label": [_LABELS, "data.label=topic"],
    "LabelsSection.errors": [_LABELS, "data.errors=replace"],
    "LabelsSection.train_share": [_LABELS, "data.train_share=0.1"],
    "LabelsSection.truncate": [_LABELS, "data.truncate=head_tail"],
    "StratifiedShare.share": [_LABELS, "data.heldout.share=0.25"],
    "LabeledSources.sources": [_LABELS, "data.heldout=held.csv"],
    "ClassificationObjective.pool": [_LABELS, "objective.pool=mean"],
    "ClassificationObjective.pooler": [_LABELS, "objective.pooler=relu"],
    "ClassificationObjective.label_smoothing": [_LABELS, "objective.label_smoothing=0.1"],
    "ClassificationObjective.token_dropout": [_LABELS, "objective.token_dropout=0.1"],
    "ClassificationObjective.class_weights": [_LABELS, "objective.class_weights={spam: 2.0, ham: 1.0}"],
    "ClassificationObjective.labels": [_LABELS, "objective.labels=[spam, ham]"],
    "ClassificationObjective.label_counts": [_LABELS, "objective.label_counts=[3, 5]"],
    "AlignedFiles.source": ["data={format: pairs, train: {source: a.de, target: a.en}}", _TRANSLATOR, "data.train.source=b.de"],
    "AlignedFiles.target": ["data={format: pairs, train: {source: a.de, target: a.en}}", _TRANSLATOR, "data.train.target=b.en"],
    "PairSources.sources": ["data={train: b.jsonl, format: pairs}", _TRANSLATOR, "data.train=[a.tsv, b.jsonl]"],
    "PairShare.share": [_PAIRS_DATA, _TRANSLATOR, "data.heldout.share=0.25"],
    "PairShare.by": [_PAIRS_DATA, _TRANSLATOR, "data.heldout.by=tail"],
    "PairsSection.source": [_PAIRS_DATA, _TRANSLATOR, "data.source=de"],
    "PairsSection.target": [_PAIRS_DATA, _TRANSLATOR, "data.target=en"],
    "PairsSection.document": [_PAIRS_DATA, _TRANSLATOR, "data.document=book"],
    "PairsSection.language": [_PAIRS_DATA, _TRANSLATOR, "data.language=lang"],
    "PairsSection.max_length_ratio": [_PAIRS_DATA, _TRANSLATOR, "data.max_length_ratio=9"],
    "PairsSection.duplicates": [_PAIRS_DATA, _TRANSLATOR, "data.duplicates=keep"],
    "PairsSection.overlap": [_PAIRS_DATA, _TRANSLATOR, "data.overlap=keep"],
    "PairsSection.vocabulary": [_PAIRS_DATA, _TRANSLATOR, "data.vocabulary=separate"],
    "PairsSection.errors": [_PAIRS_DATA, _TRANSLATOR, "data.errors=replace"],
    "PairsSection.batch_tokens": [_PAIRS_DATA, _TRANSLATOR, "data.batch_tokens=4096"],
    "TranslationObjective.label_smoothing": [_PAIRS_DATA, _TRANSLATOR, "objective.label_smoothing=0.2"],
    "TranslationObjective.select": [_PAIRS_DATA, _TRANSLATOR, "objective.select=bleu"],
    "TranslationObjective.source_vocab_size": [_PAIRS_DATA, _TRANSLATOR, "objective.source_vocab_size=99"],
    "EncoderDecoderSection.preset": [_PAIRS_DATA, _TRANSLATOR, "model.preset=transformer"],
    "EncoderDecoderSection.n_layer": [_PAIRS_DATA, _TRANSLATOR, "model.n_layer=3"],
    "EncoderDecoderSection.n_decoder_layer": [_PAIRS_DATA, _TRANSLATOR, "model.n_decoder_layer=2"],
    "EncoderDecoderSection.n_head": [_PAIRS_DATA, _TRANSLATOR, "model.n_head=4"],
    "EncoderDecoderSection.n_kv_head": [_PAIRS_DATA, _TRANSLATOR, "model.n_kv_head=2"],
    "EncoderDecoderSection.n_embd": [_PAIRS_DATA, _TRANSLATOR, "model.n_embd=128"],
    "EncoderDecoderSection.head_dim": [_PAIRS_DATA, _TRANSLATOR, "model.head_dim=16"],
    "EncoderDecoderSection.context_length": [_PAIRS_DATA, _TRANSLATOR, "model.context_length=31"],
    "EncoderDecoderSection.norm": [_PAIRS_DATA, _TRANSLATOR, "model.norm=layernorm"],
    "EncoderDecoderSection.norm_position": [_PAIRS_DATA, _TRANSLATOR, "model.norm_position=post"],
    "EncoderDecoderSection.norm_eps": [_PAIRS_DATA, _TRANSLATOR, "model.norm_eps=1e-3"],
    "EncoderDecoderSection.norm_gain": [_PAIRS_DATA, _TRANSLATOR, "model.norm_gain=off"],
    "EncoderDecoderSection.position": [_PAIRS_DATA, _TRANSLATOR, "model.position=none"],
    "EncoderDecoderSection.rope_theta": [_PAIRS_DATA, _TRANSLATOR, "model.rope_theta=5e5"],
    "EncoderDecoderSection.feed_forward": [_PAIRS_DATA, _TRANSLATOR, "model.feed_forward=silu"],
    "EncoderDecoderSection.feed_forward_multiple": [_PAIRS_DATA, _TRANSLATOR, "model.feed_forward_multiple=3"],
    "EncoderDecoderSection.n_inner": [_PAIRS_DATA, _TRANSLATOR, "model.n_inner=64"],
    "EncoderDecoderSection.bias": [_PAIRS_DATA, _TRANSLATOR, "model.bias=on"],
    "EncoderDecoderSection.head_bias": [_PAIRS_DATA, _TRANSLATOR, "model.head_bias=on"],
    "EncoderDecoderSection.tie_embeddings": [_PAIRS_DATA, _TRANSLATOR, "model.tie_embeddings=output"],
    "EncoderDecoderSection.scale_embeddings": [_PAIRS_DATA, _TRANSLATOR, "model.scale_embeddings=on"],
    "EncoderDecoderSection.learned_start": [_PAIRS_DATA, _TRANSLATOR, "model.learned_start=off"],
    "EncoderDecoderSection.qk_norm": [_PAIRS_DATA, _TRANSLATOR, "model.qk_norm=off"],
    "EncoderDecoderSection.embedding_norm": [_PAIRS_DATA, _TRANSLATOR, "model.embedding_norm=off"],
    "EncoderDecoderSection.zero_init_outputs": [_PAIRS_DATA, _TRANSLATOR, "model.zero_init_outputs=off"],
    "EncoderDecoderSection.dropout": [_PAIRS_DATA, _TRANSLATOR, "model.dropout=0.3"],
    "EncoderDecoderSection.attention_dropout": [_PAIRS_DATA, _TRANSLATOR, "model.attention_dropout=0.2"],
    "EncoderDecoderSection.logit_softcap": [_PAIRS_DATA, _TRANSLATOR, "model.logit_softcap=15"],
    "RecurrentEncoderDecoderSection.preset": [_PAIRS_DATA, _RECURRENT, "model.preset=sutskever"],
    "RecurrentEncoderDecoderSection.cell": [_PAIRS_DATA, _RECURRENT, "model.cell=lstm"],
    "RecurrentEncoderDecoderSection.n_layer": [_PAIRS_DATA, _RECURRENT, "model.n_layer=3"],
    "RecurrentEncoderDecoderSection.n_embd": [_PAIRS_DATA, _RECURRENT, "model.n_embd=128"],
    "RecurrentEncoderDecoderSection.encoder_direction": [_PAIRS_DATA, _RECURRENT, "model.encoder_direction=forward"],
    "RecurrentEncoderDecoderSection.attention": [_PAIRS_DATA, _RECURRENT, "model.attention=none"],
    "RecurrentEncoderDecoderSection.context_length": [_PAIRS_DATA, _RECURRENT, "model.context_length=31"],
    "RecurrentEncoderDecoderSection.tie_embeddings": [_PAIRS_DATA, _RECURRENT, "model.tie_embeddings=output"],
    "RecurrentEncoderDecoderSection.dropout": [_PAIRS_DATA, _RECURRENT, "model.dropout=0.3"],
    "InverseSqrtSchedule.name": ["training.schedule=inverse_sqrt"],
    "InverseSqrtSchedule.warmup": ["training.schedule=inverse_sqrt", "training.schedule.warmup=0.3"],
    "NoamSchedule.name": ["training.schedule={name: noam, warmup: 5}"],
    "NoamSchedule.warmup": ["training.schedule={name: noam, warmup: 5}", "training.schedule.warmup=4"],
    "NoamSchedule.width": ["training.schedule={name: noam, warmup: 5}", "training.schedule.width=256"],
}

# Keys that accept only one value, so no override can change them.
ONE_VALUE = {
    "EncoderSection.architecture",
    "MaskedLMObjective.name",
    "ChatSection.format",
    "PreferencesSection.format",
    "DPOObjective.name",
    "LabelsSection.format",
    "ClassificationObjective.name",
    "DataSection.format",
    "DecoderSection.architecture",
    "CausalLMObjective.name",
    "RnnSection.architecture",
    "LstmSection.architecture",
    "GruSection.architecture",
    "FeedForwardSection.architecture",
    "NgramSection.architecture",
    "EncoderDecoderSection.architecture",
    "RecurrentEncoderDecoderSection.architecture",
    "PairsSection.format",
    "TranslationObjective.name",
}


def read(*settings: str) -> Recipe:
    return loads(BASE, settings, check_files=False)


def test_every_key_in_the_schema_is_tested() -> None:
    assert set(leaves(Recipe)) == set(SETTINGS) | ONE_VALUE


def test_only_keys_with_a_single_possible_value_are_not_tested() -> None:
    single = {
        f"{section.__name__}.{key}"
        for section in sections_of(Recipe)
        for key, field in section.model_fields.items()
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
    }
    assert single - set(SETTINGS) == ONE_VALUE


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_key_survives_a_round_trip(settings: list[str]) -> None:
    recipe = read(*settings)
    path, _, written = settings[-1].partition("=")
    changed = changes(read(*settings[:-1]), recipe)
    assert any(key == path or key.startswith(f"{path}.") for key in changed), "the key has no effect"
    again = loads(recipe.to_yaml(), check_files=False)
    assert again == recipe
    assert changes(recipe, again) == {}
    value = yaml.safe_load(written)
    if type(value) in (int, float) and path in changed:
        assert changed[path][1] == value


PARTS = {
    "preset": [f"model.preset={name}" for name in DECODER_PRESETS],
    "optimizer": ["training.optimizer=muon", "training.optimizer=adamw", "training.optimizer=auto"],
    "schedule": [f"training.schedule={name}" for name in ("wsd", "cosine", "linear", "constant", "inverse_sqrt")],
    "tokenizer": [
        "tokenizer=bpe",
        "tokenizer=char",
        "tokenizer=byte",
        "tokenizer=unigram",
        "tokenizer=word",
        "tokenizer=wordpiece",
        "tokenizer={path: a.json}",
        "tokenizer={vocab_size: 300}",
    ],
    "heldout": [
        "data.heldout=0.2",
        "data.heldout={by: document}",
        "data.heldout=b.txt",
        "data.heldout=[b.txt, c.txt]",
        "data.heldout={sources: d}",
    ],
}


@pytest.mark.parametrize("part", [setting for settings in PARTS.values() for setting in settings])
def test_a_resolved_recipe_survives_a_round_trip_for_every_variant_and_short_form(part: str, tmp_path: Path) -> None:
    for preset in PARTS["preset"]:
        recipe = read(preset, part)
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load(file, check_files=False) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "1e6",
        "08",
        "1_0",
        "off",
        "null",
        "~",
        "",
        " ",
        "=",
        "<<",
        "- a",
        "a: b",
        "#",
        "'",
        '"',
        "naïve 🙂",
        "a\nb\n",
        "\t",
        "\x85",
        "a\u2028b",
        "\r\n",
        ".5",
        "5.",
    ],
)
def test_strings_that_look_like_other_values_stay_strings(text: str) -> None:
    recipe = read()
    data = recipe.data.model_copy(update={"field": text, "train": ("1e-3", f"{text}.txt")})
    sampling = recipe.sampling.model_copy(update={"every": 7, "prompts": (text, "1e6")})
    recipe = recipe.model_copy(update={"data": data, "sampling": sampling})
    assert loads(recipe.to_yaml(), check_files=False) == recipe
    assert yaml.safe_load(recipe.to_yaml())["data"]["field"] == text


def test_a_resolved_recipe_contains_every_default() -> None:
    written = flattened(yaml.safe_load(read().to_yaml()))
    parts = {key for preset in DECODER_PRESETS.values() for key in preset}
    assert {f"model.{part}" for part in parts} <= set(written)
    assert written["training.optimizer.name"] == "muon"
    assert written["training.optimizer.newton_schulz_steps"] == 3
    assert written["data.heldout.share"] == 0.1


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_a_preset_equals_its_keys_written_out(preset: str) -> None:
    plain = read(f"model.preset={preset}")
    written_out = read(
        f"model.preset={preset}", *(f"model.{key}={json.dumps(value)}" for key, value in DECODER_PRESETS[preset].items())
    )
    assert plain == written_out


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_each_key_of_a_preset_can_be_overridden_separately(preset: str) -> None:
    plain = read(f"model.preset={preset}")
    for other in DECODER_PRESETS.values():
        for key, value in other.items():
            changed = changes(plain, read(f"model.preset={preset}", f"model.{key}={json.dumps(value)}"))
            assert changed == (
                {} if value == DECODER_PRESETS[preset][key] else {f"model.{key}": (DECODER_PRESETS[preset][key], value)}
            )


def test_a_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read().model.n_layer = 3  # type: ignore[misc]


def test_the_feed_forward_width_is_rounded_to_a_multiple_of_eight() -> None:
    widths = {
        (n_embd, multiple): read(
            f"model.n_embd={n_embd}", "model.n_head=2", f"model.feed_forward_multiple={multiple}"
        ).model.feed_forward_width
        for n_embd, multiple in [(384, 4), (768, 8 / 3), (100, 4), (36, 2.7), (4, 0.5)]
    }
    assert widths == {(384, 4): 1536, (768, 8 / 3): 2048, (100, 4): 400, (36, 2.7): 96, (4, 0.5): 8}


def test_the_former_name_of_the_rational_function_is_accepted() -> None:
    assert MuonOptimizer.model_validate({"name": "muon", "orthogonalization": "zolotarev"}).orthogonalization == "rational"
