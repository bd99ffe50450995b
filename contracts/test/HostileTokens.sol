// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// Takes one percent of every transfer.
contract FeeToken is ERC20("fee", "FEE") {
    constructor() {
        _mint(msg.sender, 1e30);
    }

    function _update(address from, address to, uint256 value) internal override {
        if (from == address(0)) return super._update(from, to, value);
        super._update(from, to, value - value / 100);
        super._update(from, address(0xFEE), value / 100);
    }
}

/// Calls back into whoever moves it, once armed, from inside the transfer.
contract ReentrantToken is ERC20("again", "AGN") {
    address public target;
    bytes public payload;
    bool public succeeded;
    bytes public answer;

    constructor() {
        _mint(msg.sender, 1e30);
    }

    function arm(address target_, bytes calldata payload_) external {
        (target, payload) = (target_, payload_);
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (target != address(0)) {
            address target_ = target;
            target = address(0);
            (succeeded, answer) = target_.call(payload);
        }
    }
}

/// Refuses to pay one address.
contract BlacklistToken is ERC20("no", "NO") {
    address public refused;

    error Refused(address who);

    constructor() {
        _mint(msg.sender, 1e30);
    }

    function refuse(address who) external {
        refused = who;
    }

    function _update(address from, address to, uint256 value) internal override {
        if (to == refused && to != address(0)) revert Refused(to);
        super._update(from, to, value);
    }
}

/// Moves tokens and answers nothing at all, like the oldest ERC-20s.
contract NoReturnToken {
    mapping(address => uint256) public balanceOf;
    mapping(address => mapping(address => uint256)) public allowance;

    error TooLittle();

    constructor() {
        balanceOf[msg.sender] = 1e30;
    }

    function approve(address spender, uint256 amount) external {
        allowance[msg.sender][spender] = amount;
    }

    function transfer(address to, uint256 amount) external {
        _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external {
        if (allowance[from][msg.sender] < amount) revert TooLittle();
        allowance[from][msg.sender] -= amount;
        _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) private {
        if (balanceOf[from] < amount) revert TooLittle();
        balanceOf[from] -= amount;
        balanceOf[to] += amount;
    }
}

/// Once armed, says no instead of reverting, and moves nothing.
contract FalseToken is ERC20("false", "F") {
    bool public armed;

    constructor() {
        _mint(msg.sender, 1e30);
    }

    function arm(bool armed_) external {
        armed = armed_;
    }

    function transfer(address to, uint256 value) public override returns (bool) {
        return armed ? false : super.transfer(to, value);
    }

    function transferFrom(address from, address to, uint256 value) public override returns (bool) {
        return armed ? false : super.transferFrom(from, to, value);
    }
}

/// Says yes and moves nothing.
contract LyingToken is ERC20("lie", "LIE") {
    function transferFrom(address, address, uint256) public pure override returns (bool) {
        return true;
    }
}

/// Scales every balance at will.
contract RebasingToken is ERC20("rebase", "RB") {
    uint256 public percent = 100;

    constructor() {
        _mint(msg.sender, 1e30);
    }

    function rebase(uint256 percent_) external {
        percent = percent_;
    }

    function balanceOf(address who) public view override returns (uint256) {
        return super.balanceOf(who) * percent / 100;
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value * 100 / percent);
    }
}
