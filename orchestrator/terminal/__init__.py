"""What a person types and sees: commands, flags, tables, refusals.

In: arguments. Out: the same calls that Python makes, printed as tables at 80 columns or as JSON, and an exit code.

    cli               the commands
    predict_commands  those that use a finished run
    rank_commands     the one that compares backbones
    search_commands   `orchestrator search`: while it runs, and in the end
    cluster_commands  those of jobs on a cluster
    run_commands      those of `orchestrator runs`
    comparison        of those: runs beside each other
    feature_commands  those of `orchestrator features`
    flags             every flag, and the setting that it sets
    answers           what the commands print: a table, or JSON
    answers_json      the JSON alone
    console           plans, results and errors on a screen
"""
