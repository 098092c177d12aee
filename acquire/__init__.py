"""From Micro-Manager to a run on disk: hook, intake, writer; beside it the link to the engine."""
