// Turns an exception into a message for ctypes.
#pragma once

#include <exception>
#include <string>

template <typename Body>
const char* guarded(Body body) {
  thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
