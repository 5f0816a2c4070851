"""Batches of a rank: a pure function of the samples consumed before, the rank and the datasets."""

import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.profiler import record_function

from megatron_bipe.config import RunConfig, accumulation_steps, check_data
from megatron_bipe.data.background_verify import BackgroundVerifier
from megatron_bipe.data.blend import open_blend
from megatron_bipe.data.collate import label_weight, make_batch
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import DataRecord, Manifest
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.data.shard import Shard
from megatron_bipe.errors import BipeError
from megatron_bipe.parallel import Mesh
from megatron_bipe.train.validation import Validation, make_validations, raise_together
from megatron_bipe.types import Batch, IntArray


class BatchLoader:
    """The training and validation batches of one rank.

    Raises:
        DataError: a dataset is missing, damaged, or shorter than a sequence.
        ConfigError: a dataset does not fit the run.
    """

    def __init__(self, run: RunConfig, mesh: Mesh) -> None:
        self._run, self._train, self._mesh = run, run.train, mesh
        self._clip = run.model.intra_clip
        self._blend = open_blend(run.data, run.train.seq_len_tokens, run.train.seed)
        for dataset in self._blend.datasets:
            check_manifest(run, dataset.manifest, dataset.path)
        self._reading_s = 0.0
        self._valid_sets = self._open_valid_sets(run)
        self.validations = make_validations(run, self._valid_sets)
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
        return bool(self.validations)

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

    def valid_batches(self, validation: Validation) -> Iterator[Batch[Tensor]]:
        """Yield this rank's part of the sequences of a validation, always the same ones."""
        for batch in validation.batches(self._run, self._mesh):
            self._shard_check.raise_if_failed()
            yield batch

    def _own_shards(self) -> list[Shard]:
        """Return the shards that this rank verifies: one rank of each model replica takes part."""
        mesh = self._mesh
        if mesh.tensor_rank or mesh.context_rank or mesh.stage:
            return []
        datasets = [*self._blend.datasets, *self._valid_sets.values()]
        return [shard for dataset in datasets for shard in dataset.shards][mesh.data_rank :: mesh.data_ranks]

    def _open_valid_sets(self, run: RunConfig) -> dict[str, TokenDataset]:
        """Open the validation sets, which must have the tokenizer and segments of the training data."""
        found, problems = dict[str, TokenDataset](), list[BipeError]()
        for name, folder in run.data.valid_sets.items():
            try:
                dataset = found[name] = open_dataset(folder)
                check_manifest(run, dataset.manifest, folder)
                dataset.check_tokenizer(self.dataset.manifest.tokenizer.fingerprint, "data.path")
                dataset.check_special_in_text(self.record.special_in_text, "data.path")
                if run.model.bilevel:
                    dataset.check_rule(self.dataset.rule, "data.path")
            except BipeError as error:
                problems.append(error)
        raise_together(problems, "the validation sets do not fit the run", "data.valid")
        return found


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
