"""A finished run on new inputs: predictions for files, texts and tables, figures for labelled data.

In: a run's directory, and what it is asked about. Out: a `Prediction` for each input, or a table of them in a file;
of labelled data a dict of figures, as results.json has them.

    inputs       what was asked about -> samples, one after the other, read when they are needed
    predictions  samples -> predictions, in the order of the inputs
    output       predictions -> a table in CSV, Parquet or JSON lines
    evaluation   labelled data -> figures
"""

from orchestrator.predictor.evaluation import evaluate as evaluate
from orchestrator.predictor.inputs import Input as Input, Line as Line
from orchestrator.predictor.output import Written as Written, require_output as require_output, write as write
from orchestrator.predictor.predictions import Prediction as Prediction, predict as predict
