"""The model that is planned: made of the tables of a file on the meta device, or by a function of the user's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_turbossd.cli.spec import TableEntry
from torchrec_turbossd.errors import ConfigError

Config: TypeAlias = "EmbeddingBagConfig | EmbeddingConfig"
_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
_POOLINGS = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


def build_model(tables: Sequence[TableEntry]) -> nn.Module:
    """A module with all bags in one `EmbeddingBagCollection`, named "bags", and the sequences in an
    `EmbeddingCollection` for each of their widths, named "sequences_64" and so on; tables take no memory."""
    model = nn.Module()
    bags = [_bag(table) for table in tables if table.kind == "bag"]
    if bags:
        model.add_module("bags", EmbeddingBagCollection(tables=bags, device=torch.device("meta")))
    sequences = [table for table in tables if table.kind == "sequence"]
    # A collection of sequences has one width.
    for dim in sorted({table.dim or 0 for table in sequences}):
        configs = [_sequence(table) for table in sequences if table.dim == dim]
        model.add_module(f"sequences_{dim}", EmbeddingCollection(tables=configs, device=torch.device("meta")))
    return model


def load_model(reference: str) -> nn.Module:
    """Call the function that `package.module:factory` names, and return the module that it makes.

    The current directory is searched first, as Python itself does.

    Raises:
        ConfigError: there is no such function, it fails, or returns something else.
    """
    module_name, _, function_name = reference.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"--model: got {reference!r}, wanted package.module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = importlib.import_module(module_name)
        for name in function_name.split("."):
            factory = getattr(factory, name)
        if not callable(factory):
            raise ConfigError(f"--model: {reference} is no function, but {type(factory).__name__}")
        model = factory()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        # Whatever the user's code raises, such as the exit of a parser of arguments.
        raise ConfigError(f"--model: {reference} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model: {reference} returned {type(model).__name__}, wanted an nn.Module")
    return model


def configs_of(model: nn.Module) -> dict[str, Config]:
    """The embedding tables of a model by name.

    Raises:
        ConfigError: there is none, or two have one name, so that nothing could be said of one alone.
    """
    found: dict[str, Config] = {}
    for module in model.modules():
        for config in _configs(module):
            if found.setdefault(config.name, config) is not config:
                raise ConfigError(f"two tables of the model are called {config.name!r}; give each a name of its own")
    if not found:
        raise ConfigError("the model has no EmbeddingBagCollection and no EmbeddingCollection")
    return found


def _configs(module: nn.Module) -> Sequence[Config]:
    if isinstance(module, EmbeddingBagCollection):
        bags: Sequence[Config] = module.embedding_bag_configs()
        return bags
    if isinstance(module, EmbeddingCollection):
        sequences: Sequence[Config] = module.embedding_configs()
        return sequences
    return []


def _bag(table: TableEntry) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=table.rows,
        embedding_dim=table.dim,
        feature_names=list(table.features),
        data_type=_DATA_TYPES[table.data_type],
        pooling=_POOLINGS[table.pooling],
    )


def _sequence(table: TableEntry) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=table.name,
        num_embeddings=table.rows,
        embedding_dim=table.dim,
        feature_names=list(table.features),
        data_type=_DATA_TYPES[table.data_type],
    )


__all__ = ["Config", "build_model", "configs_of", "load_model"]
