"""What the driver drives: blades, chiplets, and the handles that software sees of them.

Nothing in here knows of address spaces or notifiers. The one thing that it asks of an address space
is to read and write bytes by frame (`Primary.read`, `Primary.write`), which is what memory is to a
device.
"""
