"""The user's labelled data -> a checked sample table on disk: classes, splits, measurements, fingerprint.

In: a folder, a table, a data set of the Hub, rows of a program. Out: `Prepared` for the gate, and `Samples`, which
reads rows of the table when they are used. Faulty data is a `DataError` that names it. Imports neither torch nor Ray.

    prepare       rows -> a checked sample table
    ingest        every row looked at once: is it there, can it be read, what is measured on it
    sources       a job's data -> its rows, opened one after the other
    folders, cells, hub_datasets   a folder's files, a table's cells, data sets -> rows
    rows          what a source gives, and which paths may be read
    tables        CSV, Parquet, JSON lines -> batches of cells
    locations     URIs -> stores (S3 and what else pyarrow and fsspec open)
    materialise   rows that a program holds -> a Parquet file
    splits        stratified, grouped and balanced splits
    samples       the sample table of a run on disk
    contents      what a sample's content is known by, and what is remembered of files
"""

from orchestrator.data.cells import input_columns as input_columns, label_columns as label_columns
from orchestrator.data.contents import (
    Catalog as Catalog,
    Ids as Ids,
    Ints as Ints,
    Marks as Marks,
    known as known,
)
from orchestrator.data.locations import (
    Found as Found,
    Location as Location,
    asking as asking,
    cached as cached,
    feature_store as feature_store,
)
from orchestrator.data.prepare import LEAVE_OUT as LEAVE_OUT, Prepared as Prepared
from orchestrator.data.samples import MAX_AT_ONCE as MAX_AT_ONCE, Samples as Samples
from orchestrator.data.sources import columns_of as columns_of
