"""Updates on the device: what may be installed, how its bytes get here, and which selection is the current one.

    acceptance  who may ask for what (pure)             authority   trust with a memory: marks, clock, the child
    trust       child: the door to TUF's client         trial       child: loads a candidate under limits
    download    resumable, bounded, content-addressed   slots       artifact folders and the current pointer
    installer   executes one update command             wire, child, files, errors: what these share

`agent.decisions.lifecycle` decides what is done next; nothing here decides that.
"""
