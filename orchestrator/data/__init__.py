"""The user's labelled data -> a checked sample table on disk: classes, splits, measurements, fingerprint.

In: a folder, a table, a data set of the Hub, rows of a program. Out: `Prepared` for the gate, and `Samples`, which
reads rows of the table when they are used. Faulty data is a `DataError` that names it. Imports neither torch nor Ray.

    prepare       rows -> a checked sample table, top to bottom
    sources       a job's data -> its rows, opened one after the other
    folders       the files of class folders -> rows
    layout        where in a folder the class folders lie: below splits, below one that wraps them
    metadata_tables  files beside a metadata.csv that names them
    table_rows    a table's cells -> rows
    unlabelled    the same of tables without labels, for a finished run
    columns       which columns samples and labels stand in
    tables        CSV, Parquet, Arrow, JSON lines -> batches of cells
    delimited     CSV and TSV: separators, and quotation marks that close or do not
    text_files    files of text: their encoding, and what is none
    arrow_files   the two forms of files that Arrow has
    arrow_cells   batches of Arrow -> cells, classes by the names that the schema tells
    hub_datasets  data sets of the Hub, or saved to disk -> batches of cells
    materialise   rows that a program holds -> a Parquet file
    rows          what a row is, and which paths it may name
    ingest        every row looked at once: is it there, can it be read, what is measured on it
    ingested      what is remembered of the rows
    duplicates    one file twice, one content in two splits
    labels        classes, targets, and whether they can be learnt
    spellings     one label under several spellings: True and true, 2 and 2.0
    splits        stratified, grouped and balanced splits
    samples       the sample table on disk: written once, memory-mapped
    table_store   the sample tables of a storage directory, each kept once for all of its runs
    shared_tables  the same of an object store; which table a run uses
    seen          which samples a run was trained on
    contents      digests that samples and data are known by, and a catalogue of files
"""

from orchestrator.data.columns import input_columns as input_columns, label_columns as label_columns
from orchestrator.data.contents import Catalog as Catalog, Ids as Ids, Ints as Ints, Marks as Marks, known as known
from orchestrator.data.ingested import Example as Example
from orchestrator.data.materialise import materialise_rows as materialise_rows
from orchestrator.data.prepare import LEAVE_OUT as LEAVE_OUT, Prepared as Prepared, prepare_data as prepare_data
from orchestrator.data.samples import MAX_AT_ONCE as MAX_AT_ONCE, Samples as Samples, split_by_size as split_by_size
from orchestrator.data.seen import num_seen as num_seen, num_seen_by_backbone as num_seen_by_backbone
from orchestrator.data.shared_tables import SharedTables as SharedTables, table_of as table_of, tables_in as tables_in
from orchestrator.data.sources import columns_of as columns_of, formed_as_run as formed_as_run
from orchestrator.data.table_store import (
    StoredTable as StoredTable,
    TableStore as TableStore,
    key_of as key_of,
    table_key as table_key,
)
from orchestrator.data.unlabelled import Unlabelled as Unlabelled, read_unlabelled as read_unlabelled
from orchestrator.job import open_storage as open_storage

# What needs pyarrow, as this wing does, and the job's wing does not.
from orchestrator.job.asking import (
    PATIENCE_S as PATIENCE_S,
    Answer as Answer,
    Asker as Asker,
    UnansweredError as UnansweredError,
)
from orchestrator.job.locations import (
    Found as Found,
    Location as Location,
    cached as cached,
    feature_store as feature_store,
    store_errors as store_errors,
)
