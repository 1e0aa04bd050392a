#include "program.h"

#include <cctype>
#include <cstring>

#include "../runtime/machine.h"
#include "frame.h"
#include "instructions.h"

namespace drope::emulation {
namespace {

bool is_name_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

std::string trimmed(const std::string& text) {
  const char* blanks = " \t\n";
  const size_t first = text.find_first_not_of(blanks);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

// At commas that stand in no bracket.
std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : text) {
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (c == ',' && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

class Parser {
 public:
  explicit Parser(const char* text) : text_(text) {}

  Program parse() {
    std::string statement;
    const std::string plain = without_comments();
    for (char c : plain) {
      // Braces around statements open scopes; those of operands come after an opcode.
      if ((c == '{' || c == '}') && trimmed(statement).empty()) continue;
      if (c == ':' && is_label(statement)) {
        program_.labels[trimmed(statement)] = static_cast<int>(program_.instructions.size());
        statement.clear();
      } else if (c == ';') {
        add_statement(trimmed(statement));
        statement.clear();
      } else {
        statement += c;
      }
    }
    if (!trimmed(statement).empty()) add_statement(trimmed(statement));
    for (Instruction& one : program_.instructions) resolve_branch(one);
    return std::move(program_);
  }

 private:
  [[noreturn]] void reject(const std::string& what) { fail("PTX: %s in: %s", what.c_str(), text_); }

  std::string without_comments() const {
    std::string result;
    for (const char* c = text_; *c; ++c) {
      if (c[0] == '/' && c[1] == '/') {
        while (c[1] && c[1] != '\n') ++c;
      } else {
        if (c[0] == '%' && c[1] == '%') ++c;
        result += *c;
      }
    }
    return result;
  }

  static bool is_label(const std::string& statement) {
    const std::string name = trimmed(statement);
    if (name.empty()) return false;
    for (char c : name) {
      if (!is_name_character(c) && c != '=') return false;
    }
    return true;
  }

  void add_statement(const std::string& statement) {
    if (statement.empty()) return;
    if (statement[0] == '.') {
      declare_registers(statement);
      return;
    }
    Instruction one;
    one.text = statement;
    std::string rest = statement;
    if (rest[0] == '@') rest = take_guard(one, rest);
    const size_t blank = rest.find_first_of(" \t\n");
    one.opcode = rest.substr(0, blank);
    if (blank != std::string::npos) {
      for (const std::string& part : split_list(rest.substr(blank))) {
        if (one.opcode == "bra") {
          labels_used_.emplace_back(program_.instructions.size(), part);
        } else {
          one.operands.push_back(parse_operand(part));
        }
      }
    }
    find_instruction(one);
    program_.instructions.push_back(one);
  }

  void declare_registers(const std::string& statement) {
    const size_t names = statement.find_first_of(" \t", 5);
    if (statement.compare(0, 5, ".reg ") != 0 || names == std::string::npos) {
      reject("directive " + statement);
    }
    for (const std::string& name : split_list(statement.substr(names))) {
      const int place = static_cast<int>(program_.registers.size());
      if (place >= kMaxRegisters) reject("too many registers");
      program_.registers.emplace(name, place);
    }
  }

  std::string take_guard(Instruction& one, const std::string& statement) {
    const size_t blank = statement.find_first_of(" \t\n");
    if (blank == std::string::npos) reject("guard without instruction");
    one.has_guard = true;
    one.guard_is_negated = statement[1] == '!';
    one.guard = parse_operand(
        statement.substr(one.guard_is_negated ? 2 : 1, blank - (one.guard_is_negated ? 2 : 1)));
    return trimmed(statement.substr(blank));
  }

  void resolve_branch(Instruction& one) {
    if (one.opcode != "bra") return;
    for (const auto& [place, label] : labels_used_) {
      if (&program_.instructions[place] != &one) continue;
      const auto found = program_.labels.find(label);
      if (found == program_.labels.end()) reject("label " + label);
      one.target = found->second;
    }
  }

  Operand parse_operand(const std::string& text) {
    Operand operand;
    if (text == "_") return operand;
    if (text[0] == '{' || text[0] == '[') return parse_bracket(text);
    if (const size_t bar = text.find('|'); bar != std::string::npos) {
      operand.kind = Operand::Kind::kPair;
      operand.parts = {parse_operand(text.substr(0, bar)), parse_operand(text.substr(bar + 1))};
      return operand;
    }
    if (const auto found = program_.registers.find(text); found != program_.registers.end()) {
      operand.kind = Operand::Kind::kRegister;
      operand.number = found->second;
      return operand;
    }
    if (text[0] == '%' && std::isdigit(static_cast<unsigned char>(text[1]))) {
      operand.kind = Operand::Kind::kAsmOperand;
      operand.number = std::stoi(text.substr(1));
      return operand;
    }
    if (text[0] == '%') {
      operand.kind = Operand::Kind::kSpecial;
      operand.number = special_register(text);
      if (operand.number < 0) reject("special register " + text);
      return operand;
    }
    char* end = nullptr;
    operand.kind = Operand::Kind::kImmediate;
    operand.number = std::strtoll(text.c_str(), &end, 0);
    if (end == text.c_str() || *end != '\0') reject("operand " + text);
    return operand;
  }

  Operand parse_bracket(const std::string& text) {
    Operand operand;
    const std::string inner = trimmed(text.substr(1, text.size() - 2));
    if (text[0] == '{') {
      operand.kind = Operand::Kind::kList;
      for (const std::string& part : split_list(inner)) {
        operand.parts.push_back(parse_operand(part));
      }
      return operand;
    }
    operand.kind = Operand::Kind::kAddress;
    const size_t plus = inner.find('+');
    if (plus != std::string::npos) {
      operand.parts.push_back(parse_operand(trimmed(inner.substr(0, plus))));
      operand.number = parse_operand(trimmed(inner.substr(plus + 1))).number;
      return operand;
    }
    for (const std::string& part : split_list(inner)) operand.parts.push_back(parse_operand(part));
    return operand;
  }

  const char* text_;
  Program program_;
  std::vector<std::pair<size_t, std::string>> labels_used_;
};

}  // namespace

Program parse_program(const char* text) { return Parser(text).parse(); }

}  // namespace drope::emulation
