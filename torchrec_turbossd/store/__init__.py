"""The row store: rows of bytes by (table, global row id), in RocksDB, in layers or in memory."""

from torchrec_turbossd.store.checkpoint import clone_directory
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.store.flat import FlatTable, FlatWriter
from torchrec_turbossd.store.known_rows import KnownRowsStore
from torchrec_turbossd.store.layered import Committed, LayeredRowStore
from torchrec_turbossd.store.memory import MemoryRowStore
from torchrec_turbossd.store.rocks import RocksRowStore, remove_store
from torchrec_turbossd.store.rocks_options import RocksOptions
from torchrec_turbossd.store.write_back import WriteBackStore

__all__ = [
    "Committed",
    "FlatTable",
    "FlatWriter",
    "KnownRowsStore",
    "LayeredRowStore",
    "MemoryRowStore",
    "RocksOptions",
    "RocksRowStore",
    "RowStore",
    "Rows",
    "WriteBackStore",
    "clone_directory",
    "remove_store",
]
