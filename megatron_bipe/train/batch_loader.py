"""Batches of a rank: a pure function of the samples consumed before, the rank and the datasets."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.profiler import record_function

from megatron_bipe.config import RunConfig, accumulation_steps, check_data
from megatron_bipe.data.background_verify import BackgroundVerifier
from megatron_bipe.data.blend import open_blend
from megatron_bipe.data.collate import label_weight, make_batch, with_row_weights
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import DataRecord, Manifest
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.data.shard import Shard
from megatron_bipe.parallel import Mesh
from megatron_bipe.types import Batch, IntArray


class BatchLoader:
    """The training and validation batches of one rank.

    Raises:
        DataError: a dataset is missing, damaged, or shorter than a sequence.
        ConfigError: a dataset does not fit the run.
    """

    def __init__(self, run: RunConfig, mesh: Mesh) -> None:
        self._train, self._mesh = run.train, mesh
        self._clip = run.model.intra_clip
        self._blend = open_blend(run.data, run.train.seq_len_tokens, run.train.seed)
        for dataset in self._blend.datasets:
            check_manifest(run, dataset.manifest, dataset.path)
        self._reading_s = 0.0
        self._valid = None
        if run.data.valid_path is not None:
            self._valid = open_dataset(run.data.valid_path)
            check_manifest(run, self._valid.manifest, run.data.valid_path)
            self._valid.check_tokenizer(self.dataset.manifest.tokenizer.fingerprint, "data.path")
            self._valid.check_special_in_text(self.record.special_in_text, "data.path")
            if run.model.bilevel:
                self._valid.check_rule(self.dataset.rule, "data.path")
            self._valid_sequences = self._choose_valid_sequences(self._valid)
        self._shard_check = BackgroundVerifier(self._own_shards() if run.data.verify else ())

    def checking_shards(self) -> BackgroundVerifier:
        """Return a context manager that verifies shards in the background against the manifest.

        Raises:
            DataError: from `train_batches` and `valid_batches`: a file is missing, has changed or is damaged.
        """
        return self._shard_check

    @property
    def record(self) -> DataRecord:
        """Record of the training data that is stored with the model."""
        return self._blend.record

    @property
    def dataset(self) -> TokenDataset:
        """The training set; the first one of a blend, whose datasets all have the same tokenizer."""
        return self._blend.datasets[0]

    @property
    def has_valid(self) -> bool:
        return self._valid is not None

    @property
    def global_batch(self) -> int:
        """Number of samples of an update, over all ranks."""
        return self._train.global_batch

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of an update on each rank."""
        return accumulation_steps(self._train, self._mesh.data_ranks)

    def sequences(self, first_sample: int) -> IntArray:
        """Return the sequence indices of an update, in sample order."""
        return self._blend.sequence_indices(first_sample, self._train.global_batch)

    def train_batches(self, first_sample: int) -> Iterator[Batch[Tensor]]:
        """Yield this rank's micro-batches of an update.

        The update consists of samples [first_sample, first_sample + global_batch), whatever the number of ranks.
        """
        train = self._train
        shape = (self.num_micro_batches, self._mesh.data_ranks, train.micro_batch)
        sequences = self.sequences(first_sample)
        weight = label_weight(self._blend, sequences, train.seq_len_tokens)
        for micro_batch in sequences.reshape(shape)[:, self._mesh.data_rank]:
            self._shard_check.raise_if_failed()
            began_s = time.perf_counter()
            with record_function("data"):
                batch = make_batch(self._blend, micro_batch, train.seq_len_tokens, self._clip, weight)
            self._reading_s += time.perf_counter() - began_s
            yield batch

    def reading_time_s(self) -> float:
        """Return the seconds spent reading training batches since the last call."""
        reading_s, self._reading_s = self._reading_s, 0.0
        return reading_s

    def valid_batches(self) -> Iterator[Batch[Tensor]]:
        """Yield this rank's shard of the validation sequences, always the same ones.

        All ranks get equally many batches of one shape. Where the sequences do not fill them, the last sequence is
        repeated with weight 0, so that the mean is over the sequences of the run whatever the number of ranks.
        """
        assert self._valid is not None
        seq_len_tokens, data_ranks = self._train.seq_len_tokens, self._mesh.data_ranks
        sequences = self._valid_sequences
        weight = label_weight(self._valid, sequences, seq_len_tokens)
        micro_batch = min(self._train.micro_batch, -(-sequences.size // data_ranks))
        padding = -sequences.size % (data_ranks * micro_batch)
        shape = (data_ranks, -1, micro_batch)
        local = np.pad(sequences, (0, padding), "edge").reshape(shape)[self._mesh.data_rank]
        counts = np.pad(np.ones(sequences.size, np.float32), (0, padding)).reshape(shape)[self._mesh.data_rank]
        for indices_B, counts_B in zip(local, counts, strict=True):
            self._shard_check.raise_if_failed()
            batch = make_batch(self._valid, indices_B, seq_len_tokens, self._clip, weight)
            yield with_row_weights(batch, counts_B) if padding else batch

    def _own_shards(self) -> list[Shard]:
        """Return the shards that this rank verifies: one rank of each model replica takes part."""
        mesh = self._mesh
        if mesh.tensor_rank or mesh.context_rank or mesh.stage:
            return []
        datasets = [*self._blend.datasets, *([self._valid] if self._valid else [])]
        return [shard for dataset in datasets for shard in dataset.shards][mesh.data_rank :: mesh.data_ranks]

    def _choose_valid_sequences(self, dataset: TokenDataset) -> IntArray:
        """Return sequences spread evenly over the set; they do not depend on the number of ranks."""
        num_sequences = dataset.num_sequences(self._train.seq_len_tokens)
        count = min(self._train.valid_samples, num_sequences)
        return np.linspace(0, num_sequences - 1, count).astype(np.int64)


def check_manifest(run: RunConfig, manifest: Manifest, folder: Path) -> None:
    """Check a run against the manifest of a dataset that it names.

    Raises:
        ConfigError: lists every mismatch.
    """
    check_data(
        run,
        vocab_size=manifest.tokenizer.vocab_size,
        segments=manifest.rule.spec,
        fixed_length=manifest.rule.fixed_length,
        examples_len_tokens=manifest.examples.seq_len_tokens if manifest.examples else None,
        location=str(folder),
    )
