// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Dispute, Outcome, State} from "./DisputeTypes.sol";
import {VerifierSeats} from "./VerifierSeats.sol";

/// @title The book of disputes: what is known of each, what each account can withdraw, and every event and error
/// @notice Tokens held = credited balances + bonds of unfinished disputes + `toBurn`. Nobody is paid but by `withdraw`.
abstract contract DisputeBook is VerifierSeats {
    using SafeERC20 for IERC20;

    /// @notice Where burned tokens go: an address without a key.
    address public constant BURN_ADDRESS = 0x000000000000000000000000000000000000dEaD;

    /// @notice The ERC-20 of stake and bonds.
    IERC20 public immutable token;

    /// @notice What an account can withdraw.
    mapping(address account => uint256) public credited;

    /// @notice Tokens that nobody gets, until `burn` sends them away.
    uint256 public toBurn;

    mapping(bytes32 id => Dispute) internal _disputes;

    event Challenged(
        bytes32 indexed id,
        address indexed provider,
        address indexed challenger,
        bytes32 model,
        uint8 task,
        uint64 bound,
        uint96 amount,
        uint96 locked,
        uint96 bond,
        uint64 drawBlock,
        uint40 drawUntil,
        bool slashable,
        bytes32 evidenceHash
    );
    event PanelDrawn(
        bytes32 indexed id, address[5] members, uint40 reportUntil, uint40 postUntil, uint40 commitUntil
    );
    event EvidenceMissing(bytes32 indexed id, address indexed member);
    event EvidencePosted(bytes32 indexed id, bytes evidence);
    event Committed(bytes32 indexed id, address indexed member, bytes32 commitment);
    /// @notice All five have committed: revealing is open at once.
    event RevealOpened(bytes32 indexed id, uint40 revealUntil);
    event Revealed(bytes32 indexed id, address indexed member, uint64 number);
    event Finished(
        bytes32 indexed id, Outcome outcome, uint8 beyond, uint8 within, uint96 taken, uint256 burned
    );
    event Credited(address indexed account, bytes32 indexed id, uint256 amount);
    event Withdrawn(address indexed account, address to, uint256 amount);
    event Burned(uint256 amount);

    /// @notice The registry does not name this contract as its disputes.
    error WrongRegistry(address registry);
    /// @notice This attempt was challenged before.
    error AlreadyDisputed(bytes32 id);
    /// @notice The caller is not the lease's client and carries no signature of its.
    error NotHolder(bytes32 id, address caller);
    /// @notice A statement is signed by somebody else than it names.
    error WrongSigner(bytes32 statement, address expected, address actual);
    /// @notice Statements that do not belong together; `what` names the first difference in ASCII.
    error StatementMismatch(bytes32 what);
    /// @notice This task has no number that a panel could reveal.
    error TaskNotDisputable(uint8 task);
    /// @notice The result is shorter than its profile rejects by itself.
    error ResultTooShort(uint32 units, uint32 minUnits);
    /// @notice The lease was issued later than now, or too long ago.
    error OutsideChallengeTime(uint64 issuedAt, uint256 until);
    /// @notice Fewer seasoned verifiers hold this model than a panel has members.
    error TooFewVerifiers(bytes32 model, uint256 seasoned);
    /// @notice The provider has less free stake than a dispute is worth.
    error StakeTooSmall(address provider, uint256 lockable);
    /// @notice The dispute is in another state.
    error WrongState(bytes32 id, State state);
    /// @notice Not before this time (unix seconds; for a draw: not before this block is past).
    error TooEarly(bytes32 id, uint256 from);
    /// @notice It had to happen before this time (unix seconds).
    error TooLate(bytes32 id, uint256 until);
    /// @notice The nonce is not the one that was committed.
    error WrongNonce(bytes32 id);
    /// @notice The hash of the draw's block is known to this chain no more: the dispute ends when its draw time is over.
    error BlockHashGone(bytes32 id, uint256 number);
    /// @notice The caller does not sit on this panel.
    error NotMember(bytes32 id, address caller);
    /// @notice The caller did not challenge.
    error NotChallenger(bytes32 id, address caller);
    /// @notice This member has done this, or what comes after it, already.
    error AlreadyDone(bytes32 id, address member);
    /// @notice The commitment is zero.
    error InvalidCommitment();
    /// @notice No evidence was reported missing.
    error NothingMissing(bytes32 id);
    /// @notice The evidence is empty.
    error NoEvidence();
    /// @notice Evidence was reported missing and not posted in time: the dispute can only be finished.
    error EvidenceOverdue(bytes32 id);
    /// @notice Number and salt are not what this member committed to.
    error WrongReveal(bytes32 id, address member);
    /// @notice Nothing is credited to the caller.
    error NothingCredited(address account);
    /// @notice There is nothing to burn.
    error NothingToBurn();
    /// @notice The recipient is zero or this contract.
    error InvalidRecipient(address to);
    /// @notice The token delivered another amount than was asked: such tokens cannot be bonded.
    error UnexpectedDeposit(uint256 expected, uint256 received);

    /// @notice Pays the caller's credit to `to`, which need not be the caller.
    function withdraw(address to) external nonReentrant {
        if (to == address(0) || to == address(this)) revert InvalidRecipient(to);
        uint256 amount = credited[msg.sender];
        if (amount == 0) revert NothingCredited(msg.sender);
        credited[msg.sender] = 0;
        emit Withdrawn(msg.sender, to, amount);
        token.safeTransfer(to, amount);
    }

    /// @notice Sends what is burned to `BURN_ADDRESS`; anyone may call it. Apart from `finish`, so that no token can hold up a verdict.
    function burn() external nonReentrant {
        uint256 amount = toBurn;
        if (amount == 0) revert NothingToBurn();
        toBurn = 0;
        emit Burned(amount);
        token.safeTransfer(BURN_ADDRESS, amount);
    }

    /// @notice All that is known of a dispute; state None for one that never was.
    function dispute(bytes32 id) external view returns (Dispute memory) {
        return _disputes[id];
    }

    // ------------------------------------------------------------------ for the contracts above

    function _in(bytes32 id, State expected) internal view returns (Dispute storage d) {
        d = _disputes[id];
        if (d.state != expected) revert WrongState(id, d.state);
    }

    function _credit(address account, bytes32 id, uint256 amount) internal {
        credited[account] += amount;
        emit Credited(account, id, amount);
    }

    function _pull(uint96 amount) internal {
        uint256 before = token.balanceOf(address(this));
        token.safeTransferFrom(msg.sender, address(this), amount);
        uint256 received = token.balanceOf(address(this)) - before;
        if (received != amount) revert UnexpectedDeposit(amount, received);
    }
}
