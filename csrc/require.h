// What an operator asks of its arguments.
#pragma once

#include <sstream>
#include <stdexcept>

namespace mim4dd {

// Called with a condition and the parts of a message: std::invalid_argument, which reaches Python as ValueError,
// unless the condition holds.
struct Require {
  const char* where;  // begins the message

  template <typename... Parts>
  void operator()(bool holds, const Parts&... message) const {
    if (holds) return;
    std::ostringstream text;
    text << where << ": ";
    (text << ... << message);
    throw std::invalid_argument(text.str());
  }
};

}  // namespace mim4dd
