"""bloomdesk for other libraries; nothing else in the runner imports this room.

May import everything above it, and the library that a module is named after.
"""
