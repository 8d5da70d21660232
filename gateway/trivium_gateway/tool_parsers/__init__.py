"""Reading tool calls out of what a model writes, one module per way of writing them.

Each parser is fed text as it comes and tells what is content and what is a call; it knows neither requests nor
responses. How the text was cut into pieces makes no difference.
"""
