// How long cores did nothing.
#pragma once

namespace specmoe {

// Nanoseconds, since the system started, in which cores that this process may use did nothing,
// added up over these; waiting for a disk is doing nothing. Negative where the system does not say.
double idle_ns();

}  // namespace specmoe
