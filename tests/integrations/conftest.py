"""transformers' progress bars would drown the report."""

import transformers

transformers.logging.disable_progress_bar()
