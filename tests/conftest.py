"What all tests start from."
import signal

# A shell that starts a job in the background has it, and all that it starts, ignore SIGINT; ours are about what it does.
signal.signal(signal.SIGINT, signal.default_int_handler)
